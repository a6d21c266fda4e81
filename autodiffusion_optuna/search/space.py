"""SearchSpace: which candidates exist, and how one is written as Optuna parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution

from autodiffusion_optuna.candidate import Candidate, skip_set, unit_indices
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.schedules import spread

CODEC = 1
TOLERANCE = 1e-9  # of a cost or a share: sums of decimal fractions are not exact


@dataclass(frozen=True)
class SearchSpace:
    """All candidates that a study may try, and their form as Optuna parameters.

    ``T``: size of the model's time grid. ``min_steps``, ``max_steps``: fewest and most timesteps.
    ``min_gap``: smallest difference of neighbouring timesteps. ``units``: names of the skippable units in
    execution order; ``unit_costs``: the share of one full network evaluation that skipping each saves
    (empty: all 0). ``max_skip``: largest share of the units that one step may skip, 0 for stage one only.
    ``max_cost``: budget in full network evaluations, None for no budget. ``visits``: for a number of steps,
    the step index of each network evaluation that the solver makes. ``chunk``: bits in one skip parameter,
    1 to 32; SQL stores parameters as doubles, which corrupt long integers.

    A candidate is *canonical* when it obeys all of these. ``decode`` makes any parameter values canonical.
    Raises ConfigError when the numbers contradict each other or no candidate meets the budget.
    """

    T: int
    min_steps: int
    max_steps: int
    min_gap: int = 1
    units: tuple[str, ...] = ()
    unit_costs: tuple[float, ...] = ()
    max_skip: float = 0.0
    max_cost: float | None = None
    visits: Callable[[int], Sequence[int]] = range
    chunk: int = 32

    def __post_init__(self) -> None:
        self._check_steps()
        self._check_units()
        cheapest = min(self._cheapest_cost(steps) for steps in range(self.min_steps, self.max_steps + 1))
        if not self._affordable(cheapest):
            raise ConfigError(
                f"max_cost {self.max_cost:g} cannot be met: the cheapest candidate costs {cheapest:.4g} "
                "network evaluations; raise max_cost or max_skip, or lower min_steps"
            )

    def _check_steps(self) -> None:
        if self.min_steps < 1 or self.min_gap < 1:
            raise ConfigError(f"min_steps {self.min_steps} and min_gap {self.min_gap} must be at least 1")
        if self.min_steps > self.max_steps:
            raise ConfigError(f"min_steps {self.min_steps} is larger than max_steps {self.max_steps}")
        if (self.max_steps - 1) * self.min_gap >= self.T:
            raise ConfigError(
                f"{self.max_steps} steps at least {self.min_gap} apart do not fit on a grid of {self.T}; "
                f"allowed: up to {(self.T - 1) // self.min_gap + 1}"
            )

    def _check_units(self) -> None:
        if not 0 <= self.max_skip <= 1:
            raise ConfigError(f"max_skip {self.max_skip} must be between 0 and 1")
        if not 1 <= self.chunk <= 32:
            raise ConfigError(f"chunk {self.chunk} must be between 1 and 32")
        if self.unit_costs and len(self.unit_costs) != len(self.units):
            raise ConfigError(f"{len(self.units)} units but {len(self.unit_costs)} unit_costs; give one for each")
        if any(cost < 0 for cost in self.unit_costs) or sum(self.unit_costs) > 1 + 1e-6:
            raise ConfigError("unit_costs must be shares of one network evaluation: none negative, sum at most 1")
        if self.units and self.max_skip > 0 and not self.skip_limit(self.max_skip):
            raise ConfigError(
                f"max_skip {self.max_skip} of {len(self.units)} units skips none; "
                f"use 0, or at least {1 / len(self.units):.3g}"
            )

    # Cost

    def cost(self, candidate: Candidate) -> float:
        """Network evaluations of a sampling run, in full ones: a step's skips count at each of its visits."""
        return self._cost(candidate.skips)

    def _cost(self, skips: Sequence[int]) -> float:
        weights = self._weights(len(skips))
        return sum(w * (1.0 - self._saved(skip)) for w, skip in zip(weights, skips, strict=True))

    def _weights(self, steps: int) -> list[int]:
        """Network evaluations at each step."""
        count = Counter(self.visits(steps))
        return [count[step] for step in range(steps)]

    def _saved(self, skip: int) -> float:
        return sum(self.unit_costs[u] for u in unit_indices(skip)) if self.unit_costs else 0.0

    def _affordable(self, cost: float) -> bool:
        return self.max_cost is None or cost <= self.max_cost + TOLERANCE

    def _cheapest_cost(self, steps: int) -> float:
        saved = sum(sorted(self.unit_costs, reverse=True)[: self.skip_limit(self.max_skip)])
        return len(self.visits(steps)) * (1.0 - saved)

    def skip_limit(self, share: float) -> int:
        """Most units that one step may skip when ``share`` of all units may be skipped."""
        return int(share * len(self.units) + TOLERANCE)

    @property
    def stage_one_possible(self) -> bool:
        """Whether a candidate that skips nothing can meet the budget; else skips are open from the start."""
        return self._affordable(min(len(self.visits(k)) for k in range(self.min_steps, self.max_steps + 1)))

    @property
    def full_steps(self) -> int:
        """Most steps that meet the budget with nothing skipped; ``min_steps`` when none do."""
        affordable = [k for k in range(self.min_steps, self.max_steps + 1) if self._affordable(len(self.visits(k)))]
        return max(affordable, default=self.min_steps)

    def open_limit(self, share: float) -> int:
        """Most units that one step may skip now; the full limit where skipping nothing is too expensive."""
        return self.skip_limit(min(share, self.max_skip) if self.stage_one_possible else self.max_skip)

    # Parameters

    def distributions(self) -> dict[str, IntDistribution]:
        """Every parameter by name, for ``max_steps`` steps; the ranges never depend on each other."""
        space = {} if self.min_steps == self.max_steps else {"steps": IntDistribution(self.min_steps, self.max_steps)}
        for step in range(self.max_steps):
            space |= self._step_distributions(step)
        return space

    def _step_distributions(self, step: int) -> dict[str, IntDistribution]:
        bits = self._chunk_bits()
        skips = {f"skip_{step:02d}_{c}": IntDistribution(0, 2**width - 1) for c, width in enumerate(bits)}
        return {f"t_{step:02d}": IntDistribution(0, self.T - 1), **skips}

    def _chunk_bits(self) -> list[int]:
        """Bits in each skip parameter of a step; empty where nothing can be skipped."""
        units = len(self.units) if self.max_skip > 0 else 0
        return [min(self.chunk, units - first) for first in range(0, units, self.chunk)]

    def encode(self, candidate: Candidate) -> dict[str, int]:
        """Parameter values of a canonical candidate: those of its own steps only."""
        params = {} if self.min_steps == self.max_steps else {"steps": candidate.steps}
        for step, (timestep, skip) in enumerate(candidate.pairs):
            params[f"t_{step:02d}"] = timestep
            for c, width in enumerate(self._chunk_bits()):
                params[f"skip_{step:02d}_{c}"] = skip >> c * self.chunk & (1 << width) - 1
        return params

    def decode(self, params: Mapping[str, Any]) -> Candidate:
        """Canonical candidate of any sampler's values: unsorted, repeated, over the budget or out of range.

        The inverse of ``encode`` on canonical candidates. Parameters of steps beyond ``steps`` are ignored.
        Raises ConfigError when a parameter is missing.
        """
        try:
            steps = self.min_steps if self.min_steps == self.max_steps else int(params["steps"])
            pairs = [self._read_step(params, k) for k in range(min(max(steps, self.min_steps), self.max_steps))]
        except KeyError as error:
            raise ConfigError(f"parameter {error} is missing: not a complete trial of this search space") from None
        return self.fit(self.repair(pairs), self.max_skip)

    def _read_step(self, params: Mapping[str, Any], step: int) -> tuple[int, int]:
        skip = 0
        for c, width in enumerate(self._chunk_bits()):
            skip |= min(max(int(params[f"skip_{step:02d}_{c}"]), 0), (1 << width) - 1) << c * self.chunk
        return min(max(int(params[f"t_{step:02d}"]), 0), self.T - 1), skip

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """Candidate of a running trial: asks for ``steps`` first, then for that many times and skip sets."""
        params: dict[str, int] = {}
        if self.min_steps != self.max_steps:
            params["steps"] = trial.suggest_int("steps", self.min_steps, self.max_steps)
        for step in range(params.get("steps", self.max_steps)):
            for name, distribution in self._step_distributions(step).items():
                params[name] = trial.suggest_int(name, distribution.low, distribution.high)
        return self.decode(params)

    def codec(self) -> dict[str, Any]:
        """What stored parameters mean, as JSON; two spaces with different codecs cannot share a study."""
        return {
            "codec": CODEC,
            "T": self.T,
            "steps": [self.min_steps, self.max_steps],
            "min_gap": self.min_gap,
            "units": list(self.units),
            "chunk": self.chunk,
        }

    # Repair

    def is_canonical(self, candidate: Candidate) -> bool:
        """Whether the candidate obeys the grid, the gap, the skip limit and the budget."""
        times, limit = candidate.timesteps, self.skip_limit(self.max_skip)
        return (
            self.min_steps <= candidate.steps <= self.max_steps
            and times[0] < self.T
            and all(a - b >= self.min_gap for a, b in pairwise(times))
            and all(s.bit_length() <= len(self.units) and s.bit_count() <= limit for s in candidate.skips)
            and self._affordable(self.cost(candidate))
        )

    def repair(self, pairs: Iterable[tuple[int, int]]) -> Candidate:
        """Candidate of (timestep, skip set) pairs in any order; repeats move to free neighbours.

        As many steps come out as go in, at most ``max_steps``. Skip sets stay with their timestep.
        """
        ordered = sorted(pairs, reverse=True)
        known = (1 << len(self.units)) - 1
        timesteps = spread([t for t, _ in ordered], self.T, self.min_gap)
        return Candidate(timesteps, tuple(skip & known for _, skip in ordered))

    def fit(self, candidate: Candidate, share: float, rng: np.random.Generator | None = None) -> Candidate:
        """The candidate, brought within the budget and ``share``: unchanged where it already is.

        Drops steps or skips more units until the budget holds. Without ``rng``: drops the step nearest to
        the one before it while more than ``min_steps`` are left, then skips the costliest unit at the step
        that skips least. With ``rng``: a coin where both are possible, and a random step and unit.
        """
        limit = self.open_limit(share)
        times = list(candidate.timesteps)
        skips = [self._trim(skip, limit, rng) for skip in candidate.skips]
        while not self._affordable(self._cost(skips)):
            droppable = len(times) > self.min_steps
            coin = rng is not None and bool(rng.random() < 0.5)
            if droppable and (not coin or not self._skip_more(skips, limit, rng)):
                step = _crowded(times) if rng is None else int(rng.integers(len(times)))
                del times[step], skips[step]
            elif not droppable:
                saved = self._skip_more(skips, limit, rng)
                assert saved, "no candidate meets the budget, which __post_init__ rules out"
        return Candidate(tuple(times), tuple(skips))

    def _trim(self, skip: int, limit: int, rng: np.random.Generator | None) -> int:
        """At most ``limit`` of the units; without ``rng`` evenly spaced, their start varying with the set.

        Keeping the first ones would hide the later units from samplers that draw whole integers.
        """
        units = unit_indices(skip)
        if len(units) <= limit:
            return skip
        if rng is not None:
            return skip_set(int(u) for u in rng.choice(units, limit, replace=False))
        return skip_set(units[(skip + j * len(units) // limit) % len(units)] for j in range(limit))

    def _skip_more(self, skips: list[int], limit: int, rng: np.random.Generator | None) -> bool:
        """Make one step cheaper, in place: one more unit, or a costlier one instead; False if impossible."""
        worth = [u for u, cost in enumerate(self.unit_costs) if cost > 0]
        visited = [k for k, weight in enumerate(self._weights(len(skips))) if weight]
        free = {k: [u for u in worth if not skips[k] >> u & 1] for k in visited}
        addable = [k for k in visited if skips[k].bit_count() < limit and free[k]]
        if addable and rng is not None:
            step = addable[int(rng.integers(len(addable)))]
            skips[step] |= 1 << free[step][int(rng.integers(len(free[step])))]
            return True
        if addable:
            step = min(addable, key=lambda k: skips[k].bit_count())
            skips[step] |= 1 << max(free[step], key=self.unit_costs.__getitem__)
            return True
        for step in visited:
            used = unit_indices(skips[step])
            if not used or not free[step]:
                continue
            cheap = min(used, key=self.unit_costs.__getitem__)
            costly = max(free[step], key=self.unit_costs.__getitem__)
            if self.unit_costs[cheap] < self.unit_costs[costly]:
                skips[step] ^= 1 << cheap | 1 << costly
                return True
        return False


def _crowded(times: Sequence[int]) -> int:
    """Index of the step nearest to the one before it."""
    return min(range(1, len(times)), key=lambda k: times[k - 1] - times[k])
