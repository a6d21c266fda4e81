"""How a candidate is brought within its limits: the gap between timesteps, the modes of a step, and the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from numpy.random import Generator

from autodiffusion_optuna.candidate import (
    REUSE,
    SKIP,
    Candidate,
    Value,
    all_units,
    grounded,
    resting,
    reused,
    unit_modes,
)

if TYPE_CHECKING:
    from autodiffusion_optuna.search.space import SearchSpace

Timesteps = tuple[int, ...]
TOLERANCE = 1e-9  # of a cost or a ratio: sums of decimal fractions are not exact


def spread(timesteps: Sequence[float], T: int, min_gap: int = 1) -> Timesteps:
    """Nearest list in [0, T) whose neighbours lie at least ``min_gap`` apart.

    ``timesteps``: descending, ties allowed; same length and order come back, and a list that is already
    right comes back as it is. Colliding runs move apart together around their mean: with ``u_i = t_i + i *
    min_gap`` the task is to make u non-increasing, which pooling adjacent violators does with the least
    squared change. Needs ``(len(timesteps) - 1) * min_gap < T``.
    """
    fits = timesteps[-1] >= 0 and timesteps[0] < T and all(a - b >= min_gap for a, b in pairwise(timesteps))
    if fits and all(isinstance(timestep, int) for timestep in timesteps):
        return tuple(map(int, timesteps))  # as most lists are; the rest would find the same
    blocks: list[tuple[float, int]] = []  # (mean of u, length), means non-increasing
    for position, timestep in enumerate(timesteps):
        mean, length = timestep + position * min_gap, 1
        while blocks and blocks[-1][0] < mean:
            earlier, count = blocks.pop()
            mean, length = (earlier * count + mean * length) / (count + length), count + length
        blocks.append((mean, length))
    lowest = (len(timesteps) - 1) * min_gap
    levels = [min(max(round(mean), lowest), T - 1) for mean, length in blocks for _ in range(length)]
    return tuple(level - position * min_gap for position, level in enumerate(levels))


def cost(space: SearchSpace, modes: Sequence[int], settings: Mapping[str, Value]) -> float:
    """Network evaluations of a sampling run, in full ones; ``settings``: every searched one by name."""
    visits = _visits_by_step(space, len(modes), settings)
    return sum(count * (1.0 - saved(space, at_step)) for count, at_step in zip(visits, modes, strict=True))


def saved(space: SearchSpace, modes: int) -> float:
    """Share of one network evaluation that the modes of a step save."""
    return sum(space.savings[mode][u] for u, mode in unit_modes(modes).items()) if modes else 0.0


def cheapest_cost(space: SearchSpace, settings: Mapping[str, Value], limit: int) -> float:
    """Least cost of any candidate with these settings of whose units at most ``limit`` rest at a step."""
    return min(least_cost(space, steps, settings, limit) for steps in space.lengths)


def least_cost(space: SearchSpace, steps: int, settings: Mapping[str, Value], limit: int) -> float:
    """The same of so many steps; where nothing can be skipped, the first of them has nothing to reuse."""
    visits, most = space.visits(steps, settings), most_saved(space, limit)
    first = 0 if space.skips else sum(step == visits[0] for step in visits)
    return len(visits) * (1.0 - most) + first * most


def most_saved(space: SearchSpace, limit: int) -> float:
    """Largest share of one network evaluation that at most ``limit`` resting units save."""
    best = SKIP if space.skips else REUSE
    return sum(sorted(space.savings[best], reverse=True)[:limit])


def is_affordable(space: SearchSpace, cost: float) -> bool:
    """Whether a cost is within the budget."""
    return space.max_cost is None or cost <= space.max_cost + TOLERANCE


def fit(space: SearchSpace, candidate: Candidate, limit: int, rng: Generator | None) -> Candidate:
    """``SearchSpace.fit`` with at most ``limit`` resting units at a step."""
    times = list(candidate.timesteps)
    modes = [
        at_step if resting(at_step).bit_count() <= limit else _trimmed(at_step, limit, rng)
        for at_step in candidate.modes
    ]
    settings = _affordable_settings(space, space.canonical_settings(candidate.settings_dict), limit, rng)
    modes = ground(space, modes, settings)
    while space.max_cost is not None and not is_affordable(space, cost(space, modes, settings)):
        droppable = len(times) > space.min_steps
        coin = rng is not None and bool(rng.random() < 0.5)
        if droppable and (not coin or not _save_more(space, modes, settings, limit, rng)):
            step = _crowded(times) if rng is None else int(rng.integers(len(times)))
            del times[step], modes[step]
            modes = ground(space, modes, settings)
        elif not droppable:
            cheaper = _save_more(space, modes, settings, limit, rng)
            assert cheaper, "no candidate meets the budget, which SearchSpace rules out"
    fitting = Candidate(tuple(times), tuple(modes), tuple(settings.items()))
    return candidate if fitting == candidate else fitting


def ground(space: SearchSpace, modes: Sequence[int], settings: Mapping[str, Value]) -> list[int]:
    """``candidate.grounded``, for a run with these settings."""
    return list(grounded(modes, _visits_by_step(space, len(modes), settings)) if any(map(reused, modes)) else modes)


def _affordable_settings(
    space: SearchSpace, settings: dict[str, Value], limit: int, rng: Generator | None
) -> dict[str, Value]:
    """The settings where some candidate with them meets the budget, else the nearest for which one does.

    The nearest differ in the fewest choices; of several the first, or a random one with ``rng``.
    """
    if not space.choices or is_affordable(space, cheapest_cost(space, settings, limit)):
        return settings
    others = [other for other in space.variants if is_affordable(space, cheapest_cost(space, other, limit))]
    changes = [sum(other[name] != settings[name] for name in space.choices) for other in others]
    nearest = [other for other, count in zip(others, changes, strict=True) if count == min(changes)]
    chosen = nearest[0 if rng is None else int(rng.integers(len(nearest)))]
    return settings | {name: chosen[name] for name in space.choices}


def _trimmed(modes: int, limit: int, rng: Generator | None) -> int:
    """``limit`` of more resting units; without ``rng`` evenly spaced, their start varying with the modes.

    Keeping the first ones would hide the later units from samplers that draw whole integers.
    """
    given = unit_modes(modes)
    units = list(given)
    if rng is not None:
        kept = [int(u) for u in rng.choice(units, limit, replace=False)]
    else:
        start = sum(1 << u for u in units)
        kept = [units[(start + j * len(units) // limit) % len(units)] for j in range(limit)]
    return sum(given[u] << 2 * u for u in kept)


def _save_more(
    space: SearchSpace, modes: list[int], settings: Mapping[str, Value], limit: int, rng: Generator | None
) -> bool:
    """Make one step cheaper, in place: one more unit rests, or a costlier one instead; False if impossible."""
    choices = _choices(space, modes, settings)
    addable = [step for step, found in choices.items() if found and resting(modes[step]).bit_count() < limit]
    if addable and rng is not None:
        step = addable[int(rng.integers(len(addable)))]
        unit, mode = choices[step][int(rng.integers(len(choices[step])))]
        modes[step] |= mode << 2 * unit
        return True
    if addable:
        step = min(addable, key=lambda k: resting(modes[k]).bit_count())
        unit, mode = max(choices[step], key=lambda choice: (space.savings[choice[1]][choice[0]], choice[1]))
        modes[step] |= mode << 2 * unit
        return True
    for step, found in choices.items():
        used = unit_modes(modes[step])
        if not used or not found:
            continue
        cheap = min(used, key=lambda u: space.savings[used[u]][u])
        costly, mode = max(found, key=lambda choice: space.savings[choice[1]][choice[0]])
        if space.savings[used[cheap]][cheap] < space.savings[mode][costly]:
            modes[step] ^= used[cheap] << 2 * cheap | mode << 2 * costly
            return True
    return space.skips and _skip_what_reuses(modes)


def _choices(
    space: SearchSpace, modes: Sequence[int], settings: Mapping[str, Value]
) -> dict[int, list[tuple[int, int]]]:
    """(unit, mode) of what may rest in place of running, at each step that is visited.

    Not what a later step reuses for want of another; that would have to run instead.
    """
    known = all_units(len(space.units))
    visited = [step for step, count in enumerate(_visits_by_step(space, len(modes), settings)) if count]
    runs = {step: known & ~resting(modes[step]) for step in visited}
    earlier, ran = {}, 0
    for step in visited:
        earlier[step], ran = ran, ran | runs[step]
    wanted, needed = 0, {}
    for step in reversed(visited):
        needed[step] = runs[step] & wanted & ~earlier[step]
        wanted = (wanted | reused(modes[step])) & ~runs[step]
    return {
        step: [
            (u, mode)
            for u in range(len(space.units))
            if (runs[step] & ~needed[step]) >> 2 * u & 1
            for mode in space.mode_codes
            if space.savings[mode][u] > 0 and (mode == SKIP or earlier[step] >> 2 * u & 1)
        ]
        for step in visited
    }


def _skip_what_reuses(modes: list[int]) -> bool:
    """Let the last unit that reuses be skipped at every step where it does, in place: what it reused need not run."""
    units = max((reused(at_step).bit_length() for at_step in modes), default=0)
    if not units:
        return False
    unit = 1 << units - 1
    for step, at_step in enumerate(modes):
        if reused(at_step) & unit:
            modes[step] ^= 3 * unit
    return True


def _visits_by_step(space: SearchSpace, steps: int, settings: Mapping[str, Value]) -> list[int]:
    """Network evaluations at each step."""
    count = Counter(space.visits(steps, settings))
    return [count[step] for step in range(steps)]


def _crowded(times: Sequence[int]) -> int:
    """Index of the step nearest to the one before it."""
    return min(range(1, len(times)), key=lambda k: times[k - 1] - times[k])
