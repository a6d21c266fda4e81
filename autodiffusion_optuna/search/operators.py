"""Operators: pure functions of (rng, space, parents, skip_ratio) to a canonical candidate.

``skip_ratio`` is the largest ratio of the units that may rest at a step now; 0 is stage one. Every child goes through
the repair of ``SearchSpace``, so it has distinct timesteps and is within the budget, and modes follow their timestep.
A mutation differs from its parent wherever the space lets it. Settings are searched in both stages.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import RUN, Candidate, Value, unit_modes
from autodiffusion_optuna.search.space import SearchSpace

Pairs = list[tuple[int, int]]  # (timestep, modes) by step
Named = dict[str, Value]  # searched settings by name, ascending; empty in most spaces
Change = Callable[[Pairs, Named], tuple[Pairs, Named]]

TRIES = 20  # of a change that repair may undo
RESIZE = 0.2  # chance that a local move adds or removes a step, where their number is open
JUMP = 0.3  # chance that a moved timestep goes anywhere, which leaves local optima
TWO_MOVES = 0.3  # chance that a local move touches two genes
OTHER_MODE = 0.3  # chance that a unit that rests is reused instead of skipped, or the other way, where both may be
SETTING = 0.35  # chance that a local move changes a setting, where any are searched
OWN_SETTINGS = 0.75  # chance that a child with a shared prefix has all settings of the parent whose prefix it is
FINEST = 0.01  # of a range: shortest local move of a number


def random_candidate(rng: Generator, space: SearchSpace, skip_ratio: float) -> Candidate:
    """Settings, steps, timesteps and number of resting units at each step all uniform, brought within the budget."""
    choices = {name: values[int(rng.integers(len(values)))] for name, values in space.choices.items()}
    numbers = {name: float(rng.uniform(low, high)) for name, (low, high) in space.ranges.items()}
    settings = space.canonical_settings({**choices, **numbers})
    limit = space.open_limit(skip_ratio)
    most = space.max_steps if limit else space.full_steps_with(settings)
    steps = int(rng.integers(space.min_steps, most + 1))
    # Distinct times of a shorter grid, pulled apart by the gap, are uniform over all lists that obey the gap.
    slack = (steps - 1) * (space.min_gap - 1)
    ranks = np.sort(rng.choice(space.T - slack, steps, replace=False))
    times = ranks + np.arange(steps) * (space.min_gap - 1)
    return _finish(rng, space, [(int(t), _random_modes(rng, space, limit)) for t in times], settings, skip_ratio)


def mutate_paper(
    rng: Generator, space: SearchSpace, parent: Candidate, skip_ratio: float, probability: float
) -> Candidate:
    """Each timestep is replaced with ``probability`` by an unused one; one at least (AutoDiffusion).

    In stage two the modes of each step are a gene too: with ``probability`` they are redrawn or one unit's changes.
    The published code leaves them as they are, by a slip. Each setting is one more gene: with
    ``probability`` a choice becomes another one, and a number is redrawn.
    """
    limit = space.open_limit(skip_ratio)

    def change(pairs: Pairs, settings: Named) -> tuple[Pairs, Named]:
        steps = len(pairs)
        of_steps = 2 * steps if limit else steps  # timesteps, then modes; the settings follow
        genes = _chosen(rng, of_steps + len(settings), probability)
        for k in range(steps):
            if genes[k]:
                pairs[k] = (_unused(rng, space, pairs, k), pairs[k][1])
            if limit and genes[steps + k]:
                redraw = rng.random() < 0.5
                modes = _random_modes(rng, space, limit) if redraw else _flip(rng, space, pairs[k][1], limit)
                pairs[k] = (pairs[k][0], modes)
        redrawn = [name for name, gene in zip(settings, genes[of_steps:], strict=True) if gene]
        return pairs, settings | {name: _other_value(rng, space, name, settings[name]) for name in redrawn}

    return _mutant(rng, space, parent, skip_ratio, change)


def mutate_local(rng: Generator, space: SearchSpace, parent: Candidate, skip_ratio: float) -> Candidate:
    """One or two timesteps move, mostly between their neighbours, or the modes of one or two or one setting change.

    The distance is log-uniform, so fine moves are as likely as coarse ones. Late steps are chosen more
    often: the first steps stay those of the parent, and the prefix cache pays only for the rest.
    """
    limit = space.open_limit(skip_ratio)

    def change(pairs: Pairs, settings: Named) -> tuple[Pairs, Named]:
        if settings and rng.random() < SETTING:
            return pairs, _move_setting(rng, space, settings)
        if space.min_steps != space.max_steps and rng.random() < RESIZE:
            return _resize(rng, space, pairs), settings
        move_modes = bool(limit) and rng.random() < 0.5
        for _ in range(2 if rng.random() < TWO_MOVES else 1):
            pairs = _move_modes(rng, space, pairs, limit) if move_modes else _move_time(rng, space, pairs)
        return pairs, settings

    return _mutant(rng, space, parent, skip_ratio, change)


def crossover_uniform(
    rng: Generator, space: SearchSpace, first: Candidate, second: Candidate, skip_ratio: float
) -> Candidate:
    """Each step from either parent with equal chance, by position in execution order (AutoDiffusion).

    The child is as long as one parent, chosen by a coin; steps that the other lacks come from that one. Each
    setting comes from either parent with equal chance.
    """
    base, other = (first, second) if rng.random() < 0.5 else (second, first)
    pairs = list(base.pairs)
    for k, pair in enumerate(other.pairs[: base.steps]):
        if rng.random() < 0.5:
            pairs[k] = pair
    return _finish(rng, space, pairs, _mixed_settings(rng, space, first, second), skip_ratio)


def crossover_prefix(
    rng: Generator, space: SearchSpace, first: Candidate, second: Candidate, skip_ratio: float
) -> Candidate:
    """First steps of ``first``, the rest of ``second``; what collides is pushed later, so the prefix stays.

    The cut lies between the first and the last step at which the parents differ, so the child is neither of
    them where that is possible. The settings are mostly those of ``first``: the solver or the guidance decides
    what the network is asked, so only candidates with equal settings share a prefix. Else each comes from either.
    """
    shorter = min(first.steps, second.steps)
    unequal = [k for k in range(shorter) if first.pairs[k] != second.pairs[k]] or [0]
    low, high = unequal[0] + 1, unequal[-1] if first.steps == second.steps else shorter
    cut = int(rng.integers(low, max(low, high) + 1))
    pairs = list(first.pairs[:cut])
    for timestep, modes in second.pairs[cut:]:
        pairs.append((min(timestep, pairs[-1][0] - space.min_gap), modes))
    settings = first.settings_dict
    if settings and rng.random() >= OWN_SETTINGS:
        settings = _mixed_settings(rng, space, first, second)
    return _finish(rng, space, pairs, settings, skip_ratio)


def _finish(
    rng: Generator, space: SearchSpace, pairs: Iterable[tuple[int, int]], settings: Named, skip_ratio: float
) -> Candidate:
    return space.fit(space.repair(pairs, tuple(settings.items())), skip_ratio, rng)


def _mutant(rng: Generator, space: SearchSpace, parent: Candidate, skip_ratio: float, change: Change) -> Candidate:
    """``change`` until the repaired child differs from its parent; a random candidate if it never does."""
    base = space.fit(parent, skip_ratio, rng)
    for _ in range(TRIES):
        child = _finish(rng, space, *change(list(base.pairs), base.settings_dict), skip_ratio)
        if child not in (base, parent):
            return child
    for _ in range(TRIES):
        child = random_candidate(rng, space, skip_ratio)
        if child not in (base, parent):
            break
    return child


def _chosen(rng: Generator, count: int, probability: float) -> NDArray[np.bool_]:
    """Independent choices, given that there is at least one: a redraw keeps their distribution."""
    for _ in range(100):
        genes = rng.random(count) < probability
        if genes.any():
            return genes
    genes = np.zeros(count, dtype=np.bool_)
    genes[int(rng.integers(count))] = True
    return genes


def _unused(rng: Generator, space: SearchSpace, pairs: Pairs, step: int) -> int:
    """A timestep that no step uses and that keeps the gap to the others, if there is one."""
    free = _free_times(space, [t for k, (t, _) in enumerate(pairs) if k != step])
    free[pairs[step][0]] = False
    times = np.flatnonzero(free)
    return int(rng.choice(times)) if len(times) else pairs[step][0]


def _free_times(space: SearchSpace, taken: Iterable[int]) -> NDArray[np.bool_]:
    """Whether each of the T timesteps keeps the gap to all that are taken."""
    free = np.ones(space.T, dtype=np.bool_)
    for timestep in taken:
        free[max(timestep - space.min_gap + 1, 0) : timestep + space.min_gap] = False
    return free


def _late_step(rng: Generator, steps: int) -> int:
    """Index of a step; the last is ``steps`` times as likely as the first."""
    return bisect_right(_late_odds(steps), rng.random())


@lru_cache(maxsize=1024)
def _late_odds(steps: int) -> list[float]:
    """Chance of each step or one before it."""
    weights = np.arange(1, steps + 1)
    odds = (weights / weights.sum()).cumsum()
    return [float(chance) for chance in odds / odds[-1]]


def _move_time(rng: Generator, space: SearchSpace, pairs: Pairs) -> Pairs:
    """Move a late step between its neighbours, or with chance JUMP to any unused timestep."""
    step = _late_step(rng, len(pairs))
    timestep, modes = pairs[step]
    if rng.random() < JUMP:
        pairs[step] = (_unused(rng, space, pairs, step), modes)
        return sorted(pairs, reverse=True)
    highest = pairs[step - 1][0] - space.min_gap if step else space.T - 1
    lowest = pairs[step + 1][0] + space.min_gap if step + 1 < len(pairs) else 0
    reach = max(space.T / len(pairs), 2.0)
    distance = round(math.exp(rng.uniform(0.0, math.log(reach))))
    moved = timestep + (distance if rng.random() < 0.5 else -distance)
    pairs[step] = (min(max(moved, lowest), highest), modes)
    return pairs


def _resize(rng: Generator, space: SearchSpace, pairs: Pairs) -> Pairs:
    """Add a step at a free timestep, with the modes of the step before it, or remove a late one."""
    grow = len(pairs) == space.min_steps or (len(pairs) < space.max_steps and rng.random() < 0.5)
    if not grow:
        del pairs[_late_step(rng, len(pairs))]
        return pairs
    times = np.flatnonzero(_free_times(space, [t for t, _ in pairs]))
    if len(times):
        timestep = int(rng.choice(times))
        before = [modes for t, modes in pairs if t > timestep] or [pairs[0][1]]
        pairs.append((timestep, before[-1]))
    return pairs


def _move_modes(rng: Generator, space: SearchSpace, pairs: Pairs, limit: int) -> Pairs:
    """Change the mode of a unit at a late step, exchange the modes of two steps, or copy them to a neighbour."""
    step, kind = _late_step(rng, len(pairs)), rng.random()
    timestep, modes = pairs[step]
    if kind < 0.6 or len(pairs) == 1:
        pairs[step] = (timestep, _flip(rng, space, modes, limit))
    elif kind < 0.8:
        other = int(rng.integers(len(pairs)))
        pairs[step], pairs[other] = (timestep, pairs[other][1]), (pairs[other][0], modes)
    else:
        neighbour = step - 1 if step == len(pairs) - 1 or (step and rng.random() < 0.5) else step + 1
        pairs[neighbour] = (pairs[neighbour][0], modes)
    return pairs


def _flip(rng: Generator, space: SearchSpace, modes: int, limit: int) -> int:
    """One unit more rests or one less, or another way; at the limit one less, or another instead."""
    used = unit_modes(modes)
    if len(space.mode_codes) > 1 and used and rng.random() < OTHER_MODE:
        unit = list(used)[int(rng.integers(len(used)))]
        return modes ^ sum(space.mode_codes) << 2 * unit
    unused = [u for u in range(len(space.units)) if u not in used]
    removed = _one(rng, used) if used else 0
    added = _mode(rng, space) << 2 * unused[int(rng.integers(len(unused)))] if unused else 0
    coin = rng.random() < 0.5
    if len(used) >= limit:
        return modes ^ removed if coin else modes ^ removed ^ added
    return modes ^ removed if used and coin else modes ^ added


def _one(rng: Generator, modes: Mapping[int, int]) -> int:
    """The mode of one of several units, as bits."""
    unit = list(modes)[int(rng.integers(len(modes)))]
    return modes[unit] << 2 * unit


def _mode(rng: Generator, space: SearchSpace) -> int:
    """One of those that are searched, by a coin where there are two."""
    codes = space.mode_codes
    return codes[int(rng.integers(len(codes)))] if len(codes) > 1 else codes[0]


def _random_modes(rng: Generator, space: SearchSpace, limit: int) -> int:
    """A number of resting units uniform in [0, limit], then that many at random."""
    if not limit:
        return RUN
    units = rng.choice(len(space.units), int(rng.integers(limit + 1)), replace=False)
    return sum(_mode(rng, space) << 2 * int(u) for u in units)


def _mixed_settings(rng: Generator, space: SearchSpace, first: Candidate, second: Candidate) -> Named:
    """Each setting from either parent with equal chance."""
    one, other = (space.canonical_settings(parent.settings_dict) for parent in (first, second))
    return {name: one[name] if rng.random() < 0.5 else other[name] for name in one}


def _other_value(rng: Generator, space: SearchSpace, name: str, value: Value) -> Value:
    """Another of the choices, or a number uniform in its range."""
    if name in space.ranges:
        return float(rng.uniform(*space.ranges[name]))
    others = [choice for choice in space.choices[name] if choice != value]
    return others[int(rng.integers(len(others)))]


def _move_setting(rng: Generator, space: SearchSpace, settings: Named) -> Named:
    """One setting: another choice, or a number moved by a log-uniform distance, with chance JUMP to anywhere."""
    name = list(settings)[int(rng.integers(len(settings)))]
    value = settings[name]
    if name in space.choices or rng.random() < JUMP:
        return settings | {name: _other_value(rng, space, name, value)}
    low, high = space.ranges[name]
    distance = (high - low) * math.exp(rng.uniform(math.log(FINEST), math.log(0.5)))
    moved = float(value) + (distance if rng.random() < 0.5 else -distance)
    return settings | {name: min(max(moved, low), high)}
