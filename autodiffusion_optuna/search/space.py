"""SearchSpace: which candidates exist, and how one is written as Optuna parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import pairwise, product
from typing import Any

import optuna
from numpy.random import Generator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autodiffusion_optuna.candidate import MODES, REUSE, RUN, SKIP, Candidate, Settings, Value, all_units, resting
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search import repair

CODEC_VERSION = 2
DECIMALS = 3  # of a searched float: finer ones would make candidates distinct that no score can tell apart
OURS = re.compile(r"steps|t_.*|modes_.*")  # names of the other parameters

Visits = Callable[[int, Mapping[str, Value]], Sequence[int]]


def visit_each_step(steps: int, settings: Mapping[str, Value]) -> range:
    """One network evaluation at each step, whatever the settings."""
    return range(steps)


@dataclass(frozen=True)
class SearchSpace:
    """All candidates that a study may try, and their form as Optuna parameters.

    ``T``: size of the model's time grid. ``min_steps``, ``max_steps``: fewest and most timesteps.
    ``min_gap``: smallest difference of neighbouring timesteps. ``units``: names of the units that need not run at every
    step, in execution order; ``modes``: what they may do instead, names of ``candidate.MODES``. ``unit_costs``: the
    share of one full network evaluation that skipping each saves (empty: all 0); ``reuse_costs``: that reusing it
    saves, no more than that (empty: as much). ``max_skip``: largest ratio of the units that do not run at a step, 0 for
    stage one only. ``max_cost``: budget in full network evaluations, None for no budget. ``visits``: for a number of
    steps and the value of every searched setting by name, the step index of each network evaluation that the solver
    makes. It may depend on ``choices``, not on ``ranges``. ``chunk``: bits that the largest value of a parameter of
    modes may have, 1 to 32; SQL stores parameters as doubles, which corrupt long integers.

    ``choices``: the values of each searched setting that has a list of them, such as the solver, at least two.
    ``ranges``: lowest and highest value of each that is any number between, such as the guidance scale; it is
    rounded to three decimals. Both are empty where only timesteps and modes are searched.

    A candidate is *canonical* when it obeys all of these. ``decode`` makes any parameter values canonical.
    Raises ConfigError when the numbers contradict each other, no candidate meets the budget, or none that has
    one of the ``choices`` does.
    """

    T: int
    min_steps: int
    max_steps: int
    min_gap: int = 1
    units: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("skip",)
    unit_costs: tuple[float, ...] = ()
    reuse_costs: tuple[float, ...] = ()
    max_skip: float = 0.0
    max_cost: float | None = None
    visits: Visits = visit_each_step
    chunk: int = 32
    choices: Mapping[str, tuple[Value, ...]] = field(default_factory=dict, hash=False)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)

    @property
    def lengths(self) -> range:
        """Numbers of steps that a candidate may have."""
        return range(self.min_steps, self.max_steps + 1)

    def __post_init__(self) -> None:
        self._check_steps()
        self._check_units()
        object.__setattr__(self, "choices", {name: self._checked_choice(name) for name in sorted(self.choices)})
        object.__setattr__(self, "ranges", {name: self._checked_range(name) for name in sorted(self.ranges)})
        self._check_cost()

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
        if not self.modes or not set(self.modes) <= MODES.keys() or len(set(self.modes)) < len(self.modes):
            raise ConfigError(f"modes {list(self.modes)} must be one or more of {', '.join(MODES)}, each once")
        for name, costs in (("unit_costs", self.unit_costs), ("reuse_costs", self.reuse_costs)):
            if costs and len(costs) != len(self.units):
                raise ConfigError(f"{len(self.units)} units but {len(costs)} {name}; give one for each")
            if any(cost < 0 for cost in costs) or sum(costs) > 1 + 1e-6:
                raise ConfigError(f"{name} must be shares of one network evaluation: none negative, sum at most 1")
        if any(reuse > skip for reuse, skip in zip(self.reuse_costs, self.savings[SKIP], strict=False)):
            raise ConfigError("reuse_costs must be at most unit_costs: a unit that is reused is left out, too")
        if self.units and self.max_skip > 0 and not self.skip_limit(self.max_skip):
            raise ConfigError(
                f"max_skip {self.max_skip} of {len(self.units)} units skips none; "
                f"use 0, or at least {1 / len(self.units):.3g}"
            )

    def _check_cost(self) -> None:
        limit = self.skip_limit(self.max_skip)
        costs = [(settings, repair.cheapest_cost(self, settings, limit)) for settings in self.variants]
        cheapest = min(cost for _, cost in costs)
        if not repair.is_affordable(self, cheapest):
            raise ConfigError(
                f"max_cost {self.max_cost:g} cannot be met: the cheapest candidate costs {cheapest:.4g} "
                "network evaluations; raise max_cost or max_skip, or lower min_steps"
            )
        for name, value in ((name, value) for name, values in self.choices.items() for value in values):
            least = min(cost for settings, cost in costs if settings[name] == value)
            if not repair.is_affordable(self, least):
                raise ConfigError(
                    f"{name}={value} cannot meet max_cost {self.max_cost:g}: its cheapest candidate costs {least:.4g} "
                    "network evaluations; leave it out, raise max_cost or max_skip, or lower min_steps"
                )

    def _checked_choice(self, name: str) -> tuple[Value, ...]:
        values = self._checked_values(name, self.choices[name])
        if len(set(values)) != len(values) or len(values) < 2:
            raise ConfigError(f"{name} = {list(values)} is searched, so it needs two or more values, each once")
        return values

    def _checked_range(self, name: str) -> tuple[float, float]:
        if name in self.choices:
            raise ConfigError(f"{name} is both a choice and a range; give one of them")
        self._checked_values(name, self.ranges[name])
        low, high = (float(bound) for bound in self.ranges[name])
        if not low < high:
            raise ConfigError(f"{name} from {low:g} to {high:g} must go from a lower to a higher number")
        if (low, high) != (round(low, DECIMALS), round(high, DECIMALS)):
            raise ConfigError(f"{name} from {low:g} to {high:g} must have bounds of at most {DECIMALS} decimals")
        return low, high

    def _checked_values(self, name: str, values: Iterable[Value]) -> tuple[Value, ...]:
        """The values as a candidate holds them: plain strings and floats."""
        if OURS.fullmatch(name):
            raise ConfigError(f"a searched setting cannot be called {name!r}: timesteps and skips are; rename it")
        try:
            return tuple(Candidate((0,), settings=((name, value),)).settings_dict[name] for value in values)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @cached_property
    def savings(self) -> dict[int, tuple[float, ...]]:
        """Share of one network evaluation that each unit saves, by mode."""
        skip = self.unit_costs or (0.0,) * len(self.units)
        return {SKIP: skip, REUSE: self.reuse_costs or skip}

    @cached_property
    def mode_codes(self) -> tuple[int, ...]:
        """The modes as a candidate holds them."""
        return tuple(sorted(MODES[name] for name in self.modes))

    @property
    def skips(self) -> bool:
        """Whether units may be skipped."""
        return SKIP in self.mode_codes

    # Settings

    @property
    def default_settings(self) -> dict[str, Value]:
        """First choice of each, and the middle of each range; ascending by name, as all settings are."""
        return self.canonical_settings({})

    def canonical_settings(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Every searched setting: as given, numbers rounded and clipped; the default for what is no such value."""
        values: dict[str, Value] = {}
        for name, allowed in self.choices.items():
            values[name] = given[name] if given.get(name) in allowed else allowed[0]
        for name, (low, high) in self.ranges.items():
            value = given.get(name)
            number = (low + high) / 2 if value is None or isinstance(value, str) or math.isnan(value) else float(value)
            values[name] = round(min(max(number, low), high), DECIMALS) + 0.0  # no -0.0
        return dict(sorted(values.items()))

    @cached_property
    def variants(self) -> list[dict[str, Value]]:
        """Settings of every combination of choices, the first choices first; numbers at their default."""
        default, combinations = self.default_settings, product(*self.choices.values())
        return [default | dict(zip(self.choices, values, strict=True)) for values in combinations]

    # Limits

    def cost(self, candidate: Candidate) -> float:
        """Network evaluations of a sampling run, in full ones: a step's modes count at each of its visits."""
        return repair.cost(self, candidate.modes, self.canonical_settings(candidate.settings_dict))

    def skip_limit(self, skip_ratio: float) -> int:
        """Most units that may rest at a step when ``skip_ratio`` of all may."""
        return int(skip_ratio * len(self.units) + repair.TOLERANCE)

    def open_limit(self, skip_ratio: float) -> int:
        """Most units that may rest at a step now; the full limit where running all is too expensive."""
        return self.skip_limit(min(skip_ratio, self.max_skip) if self.stage_one_possible else self.max_skip)

    @cached_property
    def stage_one_possible(self) -> bool:
        """Whether a candidate whose units all run can meet the budget; else modes are open from the start."""
        return any(repair.is_affordable(self, repair.cheapest_cost(self, settings, 0)) for settings in self.variants)

    @cached_property
    def full_steps(self) -> int:
        """Most steps that meet the budget with all units running and the default settings; see ``full_steps_with``."""
        return self.full_steps_with(self.default_settings)

    def full_steps_with(self, settings: Mapping[str, Value]) -> int:
        """Most steps that meet the budget with all units running; ``min_steps`` when none do."""
        affordable = [k for k in self.lengths if repair.is_affordable(self, len(self.visits(k, settings)))]
        return max(affordable, default=self.min_steps)

    def most_evaluations(self, settings: Mapping[str, Value]) -> int:
        """Most network evaluations of a candidate with these settings, whatever rests; 0 where none is affordable.

        ``settings``: every searched one by name.
        """
        limit = self.skip_limit(self.max_skip)
        fitting = (k for k in self.lengths if repair.is_affordable(self, repair.least_cost(self, k, settings, limit)))
        return max((len(self.visits(k, settings)) for k in fitting), default=0)

    # Parameters

    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter by name, for ``max_steps`` steps; the ranges never depend on each other.

        Settings go by their own names.
        """
        space: dict[str, BaseDistribution] = {}
        if self.min_steps != self.max_steps:
            space["steps"] = IntDistribution(self.min_steps, self.max_steps)
        for step in range(self.max_steps):
            space |= self._step_distributions(step)
        space |= {name: CategoricalDistribution(values) for name, values in self.choices.items()}
        space |= {name: FloatDistribution(low, high) for name, (low, high) in self.ranges.items()}
        return space

    def _step_distributions(self, step: int) -> dict[str, IntDistribution]:
        modes = {
            f"modes_{step:02d}_{c}": IntDistribution(0, self._base ** len(units) - 1)
            for c, units in enumerate(self._chunks)
        }
        return {f"t_{step:02d}": IntDistribution(0, self.T - 1), **modes}

    @cached_property
    def _codes(self) -> tuple[int, ...]:
        """Mode by digit."""
        return (RUN, *self.mode_codes)

    @property
    def _base(self) -> int:
        """Of the numbers that hold modes: a digit says which of ``mode_codes`` a unit is in, 0 that it runs."""
        return 1 + len(self.modes)

    @cached_property
    def _chunks(self) -> list[range]:
        """Units of each parameter of modes; none where all units run."""
        units = len(self.units) if self.max_skip > 0 else 0
        size = max(int(self.chunk / math.log2(self._base) + repair.TOLERANCE), 1)
        return [range(first, min(first + size, units)) for first in range(0, units, size)]

    def encode(self, candidate: Candidate) -> dict[str, Any]:
        """Parameter values of a canonical candidate: those of its own steps only, and its settings."""
        params: dict[str, Any] = {} if self.min_steps == self.max_steps else {"steps": candidate.steps}
        for step, (timestep, modes) in enumerate(candidate.pairs):
            params[f"t_{step:02d}"] = timestep
            for c, units in enumerate(self._chunks):
                digits = [self._codes.index(modes >> 2 * u & 3) for u in reversed(units)]
                params[f"modes_{step:02d}_{c}"] = reduce(lambda number, digit: number * self._base + digit, digits)
        return params | candidate.settings_dict

    def decode(self, params: Mapping[str, Any]) -> Candidate:
        """Canonical candidate of any sampler's values: unsorted, repeated, over the budget or out of range.

        The inverse of ``encode`` on canonical candidates. Parameters of steps beyond ``steps`` are ignored.
        Raises ConfigError when a parameter is missing or a setting is none of its choices, and what int and float raise
        for other values.
        """
        try:
            pairs = [self._read_step(params, step) for step in range(self._read_steps(params))]
            settings = {name: params[name] for name in self.choices}
            settings |= {name: float(params[name]) for name in self.ranges}
        except KeyError as error:
            raise ConfigError(f"parameter {error} is missing: not a complete trial of this search space") from None
        for name, allowed in self.choices.items():
            if settings[name] not in allowed:
                raise ConfigError(
                    f"parameter {name!r} is {settings[name]!r}; allowed here: {', '.join(map(str, allowed))}"
                )
        return self.fit(self.repair(pairs, tuple(self.canonical_settings(settings).items())), self.max_skip)

    def _read_steps(self, params: Mapping[str, Any]) -> int:
        steps = self.max_steps if self.min_steps == self.max_steps else int(params["steps"])
        return min(max(steps, self.min_steps), self.max_steps)

    def _read_step(self, params: Mapping[str, Any], step: int) -> tuple[int, int]:
        modes = 0
        for c, units in enumerate(self._chunks):
            number = min(max(int(params[f"modes_{step:02d}_{c}"]), 0), self._base ** len(units) - 1)
            for u in units:
                number, digit = divmod(number, self._base)
                modes |= self._codes[digit] << 2 * u
        return min(max(int(params[f"t_{step:02d}"]), 0), self.T - 1), modes

    def suggest(self, trial: optuna.Trial) -> Candidate:
        """Candidate of a running trial: asks for ``steps``, that many times and their modes, and the settings."""
        params: dict[str, Any] = {}
        if self.min_steps != self.max_steps:
            params["steps"] = trial.suggest_int("steps", self.min_steps, self.max_steps)
        for step in range(self._read_steps(params)):
            for name, distribution in self._step_distributions(step).items():
                params[name] = trial.suggest_int(name, distribution.low, distribution.high)
        for name, values in self.choices.items():
            params[name] = trial.suggest_categorical(name, values)
        for name, (low, high) in self.ranges.items():
            params[name] = trial.suggest_float(name, low, high)
        return self.decode(params)

    def codec(self) -> dict[str, Any]:
        """What stored parameters mean, as JSON; two spaces with different codecs cannot share a study."""
        return {
            "codec": CODEC_VERSION,
            "T": self.T,
            "steps": [self.min_steps, self.max_steps],
            "min_gap": self.min_gap,
            "units": list(self.units),
            "modes": list(self.modes),
            "chunk": self.chunk,
            "choices": {name: list(values) for name, values in self.choices.items()},
            "ranges": {name: list(bounds) for name, bounds in self.ranges.items()},
        }

    # Repair

    def is_canonical(self, candidate: Candidate) -> bool:
        """Whether the candidate obeys the grid, the gap, modes and their limit, the budget, and has every setting."""
        times, limit = candidate.timesteps, self.skip_limit(self.max_skip)
        settings = self.canonical_settings(candidate.settings_dict)
        return (
            candidate.steps in self.lengths
            and times[0] < self.T
            and all(a - b >= self.min_gap for a, b in pairwise(times))
            and all(modes == self._known(modes) and resting(modes).bit_count() <= limit for modes in candidate.modes)
            and tuple(repair.ground(self, candidate.modes, settings)) == candidate.modes
            and candidate.settings_dict == settings
            and repair.is_affordable(self, self.cost(candidate))
        )

    def repair(self, pairs: Iterable[tuple[int, int]], settings: Settings = ()) -> Candidate:
        """Candidate of (timestep, modes) pairs in any order; repeats move to free neighbours.

        As many steps come out as go in, at most ``max_steps``. Modes stay with their timestep. ``settings``
        are taken as they are; ``fit`` completes them.
        """
        ordered = sorted(pairs, reverse=True)
        timesteps = repair.spread([t for t, _ in ordered], self.T, self.min_gap)
        return Candidate(timesteps, tuple(self._known(modes) for _, modes in ordered), settings)

    def _known(self, modes: int) -> int:
        """The modes of the units that there are, those that are searched."""
        known = all_units(len(self.units))
        return sum(known << code - 1 & modes for code in self.mode_codes)

    def fit(self, candidate: Candidate, skip_ratio: float, rng: Generator | None = None) -> Candidate:
        """The candidate, brought within the budget and ``skip_ratio``: unchanged where it already is.

        Settings that are missing get their default, unknown ones go. A unit that is to reuse a branch and has not run
        before runs. Drops steps or lets more units rest until the budget holds. Without ``rng``: drops the step nearest
        to the one before it while more than ``min_steps`` are left, then the costliest unit rests at the step at which
        fewest do. With ``rng``: a coin where both are possible, and a random step and unit. Where neither is enough, as
        few settings change as will do.
        """
        return repair.fit(self, candidate, self.open_limit(skip_ratio), rng)
