"""The nodes of a sampling run: time index, signal level and noise level of each."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.noise import Final, NoiseSchedule


class Node(NamedTuple):
    """A point of a run: time index, signal level, noise level."""

    t: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class Times:
    """The nodes of one sampling run: K timesteps, then the final point.

    ``timesteps``: K time indices, strictly descending (a fraction lies between two indices).
    ``alpha``, ``sigma``, ``lam``: K + 1 floats, levels and log(alpha / sigma) at the timesteps and the final
    point; ``lam`` ends in infinity where sigma ends in 0.
    ``final``: ``"zero"`` ends at alpha = 1, sigma = 0; ``"sigma_min"`` ends at index 0 of the schedule.
    ``schedule``: what the levels were taken from.
    """

    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    lam: tuple[float, ...]
    final: Final
    schedule: NoiseSchedule

    @property
    def steps(self) -> int:
        """K, the number of timesteps."""
        return len(self.timesteps)

    @property
    def rho(self) -> tuple[float, ...]:
        """sigma / alpha at the K + 1 nodes."""
        return tuple(s / a for a, s in zip(self.alpha, self.sigma, strict=True))

    def time(self, node: int) -> float:
        """Time index of a node; the final point counts as index 0."""
        return self.timesteps[node] if node < self.steps else 0

    def node(self, node: int) -> Node:
        """Node 0 to K."""
        return Node(self.time(node), self.alpha[node], self.sigma[node])

    def middle(self, node: int) -> Node:
        """The point halfway in lambda from ``node`` to the next, whose sigma is not 0; its time is a fraction."""
        t = _time_between(self.schedule, self.time(node), self.time(node + 1))
        return Node(t, self.schedule.alpha(t), self.schedule.sigma(t))


def times(schedule: NoiseSchedule, timesteps: Sequence[float], final: Final) -> Times:
    """Nodes of ``timesteps`` (strictly descending, in [0, T - 1]) on ``schedule``.

    ``ConfigError`` where the list is empty, not descending or leaves the schedule, or ``final`` is unknown.
    """
    listed = tuple(timesteps)
    if not listed or any(s <= t for s, t in itertools.pairwise(listed)):
        raise ConfigError(f"timesteps must be strictly descending and not empty, got {list(listed)}")
    if listed[0] > schedule.T - 1 or listed[-1] < 0:
        raise ConfigError(f"timesteps must lie in [0, {schedule.T - 1}], got {listed[0]} to {listed[-1]}")
    if final not in ("zero", "sigma_min"):
        raise ConfigError(choose_from("final", final, ["zero", "sigma_min"]))
    end = (1.0, 0.0) if final == "zero" else (schedule.alpha(0), schedule.sigma(0))
    alpha = (*(schedule.alpha(t) for t in listed), end[0])
    sigma = (*(schedule.sigma(t) for t in listed), end[1])
    lam = tuple(math.log(a / s) if s > 0 else math.inf for a, s in zip(alpha, sigma, strict=True))
    return Times(listed, alpha, sigma, lam, final, schedule)


@functools.lru_cache(maxsize=4096)
def _time_between(schedule: NoiseSchedule, high: float, low: float) -> float:
    """Time index halfway in lambda from index ``high`` to ``low``, by bisection to the last bit."""
    target = (schedule.lambda_(high) + schedule.lambda_(low)) / 2
    k = int(np.searchsorted(-schedule.lambdas, -target, side="right").clip(1, schedule.T - 1)) - 1
    pair = slice(k, k + 2)  # the two indices around it; a schedule of two is quick to read
    near = NoiseSchedule(schedule.alphas[pair], schedule.sigmas[pair], schedule.model_times[pair])
    low, high = max(low, k), min(high, k + 1)
    while low < (t := (low + high) / 2) < high:
        low, high = (t, high) if near.lambda_(t - k) > target else (low, t)
    return t
