"""Which candidate comes next: stage, niche, operator, offspring and the choice among them.

A pure function of what was tried, the space, the sizes and random numbers; it knows no study.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search import operators, surrogate
from autodiffusion_optuna.search.history import History, Record, best, expected, skip_ratio_at, stage_two_start
from autodiffusion_optuna.search.presets import Preset
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.thrift import THRIFT
from autodiffusion_optuna.search.timesteps import uniform_timesteps
from autodiffusion_optuna.storage.attrs import GENERATION, OPERATOR, PARENTS, SKIP_RATIO, STAGE

OPERATOR_TRIES = 20  # of an operator whose child is taken
RANDOM_TRIES = 100  # of random candidates after that; then a repeat is allowed
NEXT_NICHE = 0.5  # chance that parents have not the best value of a choice but the next best one, and so on
UNIFORM_MUTATION = 0.1  # chance per gene of the mutants of uniform in generation 0 (AutoDiffusion)


@dataclass(frozen=True)
class Proposal:
    """A candidate and where it came from; the names of the fields are those that are stored with a trial.

    ``operator``: "uniform", "random", "mutation" or "crossover"; "baseline" for a trial that was enqueued or is a
    start, "unknown" for one that tries another candidate than is proposed for it now. ``skip_ratio``: largest ratio
    of units that a step could skip. ``parents``: numbers of the trials it was made from.
    """

    candidate: Candidate
    generation: int
    stage: int
    operator: str
    skip_ratio: float
    parents: tuple[int, ...] = ()

    @property
    def origin(self) -> dict[str, Any]:
        """All but the candidate, as JSON."""
        origin = {**vars(self), "parents": list(self.parents)}
        del origin["candidate"]
        return origin

    @classmethod
    def from_attrs(cls, candidate: Candidate | None, attrs: Mapping[str, Any]) -> Proposal | None:
        """What is stored with a trial that was begun with ``candidate``; None where a part of it is missing."""
        whole = all(attrs.get(name) is not None for name in (GENERATION, STAGE, OPERATOR, SKIP_RATIO))
        if candidate is None or not whole or not isinstance(attrs.get(PARENTS), list):
            return None
        origin = attrs[GENERATION], attrs[STAGE], attrs[OPERATOR], attrs[SKIP_RATIO]
        return cls(candidate, *origin, tuple(attrs[PARENTS]))


def propose(
    history: History,
    space: SearchSpace,
    preset: Preset,
    rng: Generator,
    *,
    barrier: bool = False,
    thrifty: bool = False,
    started: bool = False,
) -> Proposal:
    """The next candidate.

    ``barrier``: parents come from earlier generations alone. ``thrifty``: children that keep more of the first steps
    of what was tried are preferred, since they cost less. ``started``: the first generation has starts enough, and no
    random candidates.
    """
    generation = history.index // preset.population_size
    if barrier:
        history = history.before(generation * preset.population_size)
    skip_ratio = _skip_ratio(history, space, preset)
    niche = _niche(rng, space, history) if preset.local else history.ranked
    elite = best(niche, preset.parents)
    operator = operator_at(history.index, preset, started)
    # A random candidate has no others to choose from, or it would not be random.
    bred = operator in ("mutation", "crossover") and history.objectives == 1
    wanted = preset.children if bred else 1
    offspring: dict[Candidate, tuple[str, tuple[int, ...]]] = {}
    for name in _attempts(operator, wanted, preset):
        if len(offspring) == wanted or (offspring and name == "random"):
            break
        child, origin, parents = _child(rng, space, preset, name, elite, generation, skip_ratio)
        if child.key not in history.taken:
            offspring.setdefault(child, (origin, parents))
    for _ in range(preset.strangers if bred and not skip_ratio else 0):  # random skips are never good ones
        stranger = operators.random_candidate(rng, space, skip_ratio)
        if stranger.key not in history.taken:
            offspring.setdefault(stranger, ("random", ()))
    if not offspring:  # nothing new is left near here: a repeat is allowed
        offspring[child] = (origin, parents)
    chosen = surrogate.choose(list(offspring), expected(history), space, THRIFT if thrifty else 0.0)
    origin, parents = offspring[chosen]
    return Proposal(chosen, generation, 2 if skip_ratio else 1, origin, skip_ratio, parents)


def next_start(history: History, space: SearchSpace, preset: Preset, starts: Sequence[Candidate]) -> Proposal | None:
    """The first of ``starts`` that was not tried, at every second place; None where a child is to be tried."""
    tried = history.taken | history.failed.keys()
    left = None if history.index % 2 else next((start for start in starts if start.key not in tried), None)
    if left is None:
        return None
    generation, skip_ratio = history.index // preset.population_size, _skip_ratio(history, space, preset)
    return Proposal(left, generation, 2 if skip_ratio else 1, "baseline", skip_ratio)


def operator_at(index: int, preset: Preset, started: bool = False) -> str:
    """Operator by place in the generation, so that each generation has exact numbers of each."""
    generation, place = divmod(index, preset.population_size)
    if index == 0:
        return "uniform"
    if generation == 0 and not (started and preset.local):
        return "random" if place <= preset.population_size // 2 else "mutation"
    if place < preset.mutation:
        return "mutation"
    return "crossover" if place < preset.mutation + preset.crossover else "random"


def _skip_ratio(history: History, space: SearchSpace, preset: Preset) -> float:
    """Largest ratio of units that a step may skip now; 0 in stage one."""
    if not space.skip_limit(space.max_skip):
        return 0.0
    if not space.stage_one_possible:
        return space.max_skip
    start = stage_two_start(history, preset.population_size, preset.stage_one_generations)
    return skip_ratio_at(history.index // preset.population_size, start, space.max_skip)


def _niche(rng: Generator, space: SearchSpace, history: History) -> list[Record]:
    """Trials that share one value of one choice, mostly that of the best trial; all without choices.

    Each solver has timesteps of its own. Where parents come only from the best trials of all, the solver that
    was lucky first crowds out the others before theirs are found.
    """
    ranked = history.ranked
    if not (space.choices and ranked) or history.objectives > 1:
        return ranked
    name = list(space.choices)[int(rng.integers(len(space.choices)))]
    values = list(dict.fromkeys(record.candidate.settings_dict[name] for record in ranked))
    chosen = values[min(int(rng.geometric(1 - NEXT_NICHE)), len(values)) - 1]
    return [record for record in ranked if record.candidate.settings_dict[name] == chosen]


def _attempts(operator: str, wanted: int, preset: Preset) -> Iterator[str]:
    """Operators to try until they have made ``wanted`` new candidates, or one at least."""
    tries = max(OPERATOR_TRIES, 2 * wanted)
    yield from [operator] * tries
    if operator == "crossover" and preset.local:
        # Parents that differ in one gene have no new child; a local move is then worth more than chance.
        yield from ["mutation"] * tries
    yield from ["random"] * RANDOM_TRIES


def _child(
    rng: Generator,
    space: SearchSpace,
    preset: Preset,
    operator: str,
    elite: Sequence[Record],
    generation: int,
    skip_ratio: float,
) -> tuple[Candidate, str, tuple[int, ...]]:
    """One try of an operator: (candidate, operator, parents); random where it has no parents."""
    if operator == "uniform":
        return _uniform(space, skip_ratio), operator, ()
    if operator == "mutation" and generation == 0 and not (preset.local and elite):
        uniform = _uniform(space, skip_ratio)
        return _mutant(rng, space, preset, uniform, skip_ratio, UNIFORM_MUTATION), operator, ()
    if operator == "random" or not elite:
        return operators.random_candidate(rng, space, skip_ratio), "random", ()
    first = _select(rng, elite, preset)
    if operator == "mutation":
        child = _mutant(rng, space, preset, first.candidate, skip_ratio, preset.mutation_probability)
        return child, operator, (first.number,)
    second = _select(rng, elite, preset)
    cross = operators.crossover_prefix if preset.local else operators.crossover_uniform
    child = cross(rng, space, first.candidate, second.candidate, skip_ratio)
    return child, operator, (first.number, second.number)


def _mutant(
    rng: Generator, space: SearchSpace, preset: Preset, parent: Candidate, skip_ratio: float, probability: float
) -> Candidate:
    if preset.local:
        return operators.mutate_local(rng, space, parent, skip_ratio)
    return operators.mutate_paper(rng, space, parent, skip_ratio, probability)


def _select(rng: Generator, elite: Sequence[Record], preset: Preset) -> Record:
    """One of the best trials, with replacement: the best of ``tournament`` draws."""
    return elite[int(rng.integers(len(elite), size=preset.tournament).min())]


def _uniform(space: SearchSpace, skip_ratio: float) -> Candidate:
    """DDIM's uniform timesteps, as many as the budget allows in full."""
    pairs = [(timestep, 0) for timestep in uniform_timesteps(space.T, space.full_steps)]
    return space.fit(space.repair(pairs), skip_ratio)
