"""Deterministic samplers, each a function of (denoise, x, times).

A solver asks ``denoise`` for the clean image at its noisy states, in order, and combines states and answers
linearly. Everything else a run needs (which units are skipped, what is remembered, what is counted) lives
inside ``denoise``. Coefficients are float64 on the host; the state keeps the dtype of ``x``. No solver writes
into a tensor it was given.

States are ``x = alpha x0 + sigma eps``. Between nodes s and t, with x0 or eps held constant,

    x_t = (sigma_t / sigma_s) x_s + (alpha_t - alpha_s sigma_t / sigma_s) x0
        = (alpha_t / alpha_s) x_s + (sigma_t - sigma_s alpha_t / alpha_s) eps.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.noise import Final, NoiseSchedule, linear

Denoise = Callable[[Tensor, float], Tensor]
"""(x float [B, ...], time index t) -> expected clean image, of x's shape and dtype."""


@dataclass(frozen=True)
class Times:
    """The nodes of one sampling run: K timesteps, then the final point.

    ``timesteps``: K time indices, strictly descending (a fraction lies between two indices).
    ``alpha``, ``sigma``, ``lam``: K + 1 floats, levels and log(alpha / sigma) at the timesteps and the final
    point; ``lam`` ends in infinity where sigma ends in 0.
    ``final``: ``"one"`` ends at alpha = 1, sigma = 0; ``"first"`` ends at index 0 of the schedule.
    """

    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    lam: tuple[float, ...]
    final: Final

    @property
    def steps(self) -> int:
        """K, the number of timesteps."""
        return len(self.timesteps)

    def time(self, node: int) -> float:
        """Time index of a node; the final point counts as index 0."""
        return self.timesteps[node] if node < self.steps else 0


Solver = Callable[[Denoise, Tensor, Times], Tensor]


def times(schedule: NoiseSchedule, timesteps: Sequence[float], final: Final) -> Times:
    """Nodes of ``timesteps`` (strictly descending, in [0, T - 1]) on ``schedule``.

    ``ConfigError`` where the list is empty, not descending or leaves the schedule, or ``final`` is unknown.
    """
    listed = tuple(timesteps)
    if not listed or any(s <= t for s, t in itertools.pairwise(listed)):
        raise ConfigError(f"timesteps must be strictly descending and not empty, got {list(listed)}")
    if listed[0] > schedule.T - 1 or listed[-1] < 0:
        raise ConfigError(f"timesteps must lie in [0, {schedule.T - 1}], got {listed[0]} to {listed[-1]}")
    if final not in ("one", "first"):
        raise ConfigError(choose_from("final", final, ["one", "first"]))
    end = (1.0, 0.0) if final == "one" else (schedule.alpha(0), schedule.sigma(0))
    alpha = (*(schedule.alpha(t) for t in listed), end[0])
    sigma = (*(schedule.sigma(t) for t in listed), end[1])
    lam = tuple(math.log(a / s) if s > 0 else math.inf for a, s in zip(alpha, sigma, strict=True))
    return Times(listed, alpha, sigma, lam, final)


def ddim(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
    """DDIM with eta = 0 (arXiv 2010.02502, eq. 12). K evaluations, first order."""
    for i, t in enumerate(times.timesteps):
        x = _move_by_data(x, denoise(x, t), times, i)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). K evaluations, second order.

    The last step is first order below 10 steps, as in the authors' code, and whenever it ends at sigma = 0,
    where it returns the last clean image.
    """
    previous = x
    for i, t in enumerate(times.timesteps):
        x0 = denoise(x, t)
        last = i == times.steps - 1
        if i == 0 or (last and (times.steps < 10 or times.sigma[i + 1] == 0)):
            data = x0
        else:
            # D = x0 + (x0 - x0_previous) / (2 r) with r = h_i / h_{i+1}. Written without r, because a final
            # step from index 0 to index 0 has h_{i+1} = 0.
            extra = (times.lam[i + 1] - times.lam[i]) / (2 * (times.lam[i] - times.lam[i - 1]))
            data = _combine((1 + extra, x0), (-extra, previous))
        x = _move_by_data(x, data, times, i)
        previous = x0
    return x


def heun(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
    """Heun's method in sigma / alpha (arXiv 2206.00364, algorithm 1). Second order.

    2K - 1 evaluations with ``final="one"``, whose last step is Euler's; 2K with ``"first"``, the last at
    index 0.
    """
    for i, t in enumerate(times.timesteps):
        x0 = denoise(x, t)
        guess = _move_by_data(x, x0, times, i)
        if times.sigma[i + 1] == 0:
            return guess
        here = _noise(x, x0, times, i)
        there = _noise(guess, denoise(guess, times.time(i + 1)), times, i + 1)
        x = _move_by_noise(x, _combine((0.5, here), (0.5, there)), times, i)
    return x


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(denoise: Denoise, x: Tensor, times: Times) -> Tensor:
    """Pseudo linear multistep as in latent diffusion (PNDM, arXiv 2202.09778). K + 1 evaluations.

    The weights are those of evenly spaced timesteps whatever the list, as in the published code. The first
    step averages the noise at both of its ends; a single step has no second end on the list and is DDIM's.
    """
    history: list[Tensor] = []
    for i, t in enumerate(times.timesteps):
        x0 = denoise(x, t)
        here = _noise(x, x0, times, i)
        history = [here, *history[:3]]
        if i == 0 and times.steps > 1:
            guess = _move_by_data(x, x0, times, i)
            there = _noise(guess, denoise(guess, times.time(1)), times, 1)
            noise = _combine((0.5, here), (0.5, there))
        else:
            noise = _combine(*zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True))
        x = _move_by_noise(x, noise, times, i)
    return x


SOLVERS: dict[str, Solver] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "heun": heun,
    "plms": plms,
}


def find_solver(name: str) -> Solver:
    """The solver of that name; ``ConfigError`` where there is none."""
    if name not in SOLVERS:
        raise ConfigError(choose_from("solver", name, SOLVERS))
    return SOLVERS[name]


@functools.cache
def query_steps(solver: str, steps: int, final: Final) -> tuple[int, ...]:
    """The step, in [0, steps), to which each network evaluation of a run belongs, in order.

    A query at a time that is not on the list belongs to the last step. Found by running the solver once on a
    single number, so it cannot disagree with the solver. ``ConfigError`` for an unknown solver.
    """
    nodes = times(linear(steps + 1), range(steps, 0, -1), final)
    asked: list[float] = []

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    find_solver(solver)(record, torch.zeros(1, 1, 1, 1, dtype=torch.float64), nodes)
    step_of = {t: i for i, t in enumerate(nodes.timesteps)}
    return tuple(step_of.get(t, steps - 1) for t in asked)


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of coefficient * tensor, in a new tensor."""
    (coefficient, tensor), *rest = terms
    total = coefficient * tensor
    for coefficient, tensor in rest:
        total = total + coefficient * tensor
    return total


def _noise(x: Tensor, x0: Tensor, times: Times, node: int) -> Tensor:
    """eps of the state ``x`` at ``node`` whose clean image is ``x0``."""
    sigma = times.sigma[node]
    return _combine((1 / sigma, x), (-times.alpha[node] / sigma, x0))


def _move_by_data(x: Tensor, x0: Tensor, times: Times, node: int) -> Tensor:
    """State at the next node, with the clean image constant in between."""
    ratio = times.sigma[node + 1] / times.sigma[node]
    return _combine((ratio, x), (times.alpha[node + 1] - ratio * times.alpha[node], x0))


def _move_by_noise(x: Tensor, noise: Tensor, times: Times, node: int) -> Tensor:
    """State at the next node, with the noise constant in between."""
    ratio = times.alpha[node + 1] / times.alpha[node]
    return _combine((ratio, x), (times.sigma[node + 1] - ratio * times.sigma[node], noise))
