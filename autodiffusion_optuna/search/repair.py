"""How a candidate is brought within its limits: the gap between timesteps, the skips of a step, and the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from numpy.random import Generator

from autodiffusion_optuna.candidate import Candidate, Value, skip_set, unit_indices

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


def cost(space: SearchSpace, skips: Sequence[int], settings: Mapping[str, Value]) -> float:
    """Network evaluations of a sampling run, in full ones; ``settings``: every searched one by name."""
    saved = [sum(space.unit_costs[u] for u in unit_indices(skip)) if space.unit_costs else 0.0 for skip in skips]
    visits = _visits_by_step(space, len(skips), settings)
    return sum(count * (1.0 - part) for count, part in zip(visits, saved, strict=True))


def cheapest_cost(space: SearchSpace, settings: Mapping[str, Value], limit: int) -> float:
    """Least cost of any candidate with these settings whose steps skip at most ``limit`` units."""
    return min(len(space.visits(steps, settings)) for steps in space.lengths) * (1.0 - most_saved(space, limit))


def most_saved(space: SearchSpace, limit: int) -> float:
    """Largest share of one network evaluation that skipping at most ``limit`` units saves."""
    return sum(sorted(space.unit_costs, reverse=True)[:limit])


def is_affordable(space: SearchSpace, cost: float) -> bool:
    """Whether a cost is within the budget."""
    return space.max_cost is None or cost <= space.max_cost + TOLERANCE


def fit(space: SearchSpace, candidate: Candidate, limit: int, rng: Generator | None) -> Candidate:
    """``SearchSpace.fit`` with at most ``limit`` units skipped at a step."""
    times = list(candidate.timesteps)
    skips = [skip if skip.bit_count() <= limit else _trimmed(skip, limit, rng) for skip in candidate.skips]
    settings = _affordable_settings(space, space.canonical_settings(candidate.settings_dict), limit, rng)
    while space.max_cost is not None and not is_affordable(space, cost(space, skips, settings)):
        droppable = len(times) > space.min_steps
        coin = rng is not None and bool(rng.random() < 0.5)
        if droppable and (not coin or not _skip_more(space, skips, settings, limit, rng)):
            step = _crowded(times) if rng is None else int(rng.integers(len(times)))
            del times[step], skips[step]
        elif not droppable:
            saved = _skip_more(space, skips, settings, limit, rng)
            assert saved, "no candidate meets the budget, which SearchSpace rules out"
    fitting = Candidate(tuple(times), tuple(skips), tuple(settings.items()))
    return candidate if fitting == candidate else fitting


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


def _trimmed(skip: int, limit: int, rng: Generator | None) -> int:
    """``limit`` of the units of a larger set; without ``rng`` evenly spaced, their start varying with the set.

    Keeping the first ones would hide the later units from samplers that draw whole integers.
    """
    units = unit_indices(skip)
    if rng is not None:
        return skip_set(int(u) for u in rng.choice(units, limit, replace=False))
    return skip_set(units[(skip + j * len(units) // limit) % len(units)] for j in range(limit))


def _skip_more(
    space: SearchSpace, skips: list[int], settings: Mapping[str, Value], limit: int, rng: Generator | None
) -> bool:
    """Make one step cheaper, in place: one more unit, or a costlier one instead; False if impossible."""
    costs = space.unit_costs
    visited = [step for step, count in enumerate(_visits_by_step(space, len(skips), settings)) if count]
    free = {step: [u for u, c in enumerate(costs) if c > 0 and not skips[step] >> u & 1] for step in visited}
    addable = [step for step in visited if skips[step].bit_count() < limit and free[step]]
    if addable and rng is not None:
        step = addable[int(rng.integers(len(addable)))]
        skips[step] |= 1 << free[step][int(rng.integers(len(free[step])))]
        return True
    if addable:
        step = min(addable, key=lambda k: skips[k].bit_count())
        skips[step] |= 1 << max(free[step], key=costs.__getitem__)
        return True
    for step in visited:
        used = unit_indices(skips[step])
        if not used or not free[step]:
            continue
        cheap, costly = min(used, key=costs.__getitem__), max(free[step], key=costs.__getitem__)
        if costs[cheap] < costs[costly]:
            skips[step] ^= 1 << cheap | 1 << costly
            return True
    return False


def _visits_by_step(space: SearchSpace, steps: int, settings: Mapping[str, Value]) -> list[int]:
    """Network evaluations at each step."""
    count = Counter(space.visits(steps, settings))
    return [count[step] for step in range(steps)]


def _crowded(times: Sequence[int]) -> int:
    """Index of the step nearest to the one before it."""
    return min(range(1, len(times)), key=lambda k: times[k - 1] - times[k])
