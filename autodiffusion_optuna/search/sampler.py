"""AutoDiffusionSampler: the two-stage evolutionary search as an Optuna sampler."""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from numpy.random import Generator
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search import generic, operators, surrogate
from autodiffusion_optuna.search.history import (
    History,
    HistoryReader,
    Record,
    best,
    bests_by_generation,
    losses,
    parameters,
    share_at,
    stage_two_start,
)
from autodiffusion_optuna.search.presets import settings_of
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.timesteps import uniform_timesteps

OPERATOR_TRIES = 20  # of an operator whose child is taken
RANDOM_TRIES = 100  # of random candidates after that; then a repeat is allowed
REMEMBERED = 256  # proposals kept for ``proposal``
NEXT_NICHE = 0.5  # chance that parents have not the best value of a choice but the next best one, and so on

# Streams of randomness. None is 0: SeedSequence takes [..., 0] for [...].
RELATIVE, INDEPENDENT, GENERIC = 1, 2, 3


UNIFORM_MUTATION = 0.1  # chance per gene of the mutants of uniform in generation 0 (AutoDiffusion)


@dataclass(frozen=True)
class Proposal:
    """A candidate and where it came from.

    ``operator``: "uniform", "random", "mutation", "crossover", or "baseline" for one that was enqueued.
    ``share``: largest share of units that a step could skip. ``parents``: numbers of the trials it was made
    from.
    """

    candidate: Candidate
    generation: int
    stage: int
    operator: str
    share: float
    parents: tuple[int, ...] = ()


class AutoDiffusionSampler(BaseSampler):
    """Evolutionary search for timesteps, then also for skipped layers (AutoDiffusion, arXiv 2309.10438).

    ``space``: what is searched; None searches whatever parameters the objective asks for, without the two
    stages. ``preset``: "adopt" (ours) or "paper" (the published operators and sizes); every other argument
    left at None is the preset's, scaled to ``population_size`` where that is given. ``seed``: None draws
    one, once.

    The state of the search is the study's trials and nothing else: each proposal is a function of them, the
    seed and the trial's index. Serial runs, resumed runs and other processes therefore repeat exactly, and
    workers need no seeds of their own. The index is the number of earlier trials that did not fail; it
    decides the generation (``index // population_size``) and, by its place there, the operator. With ``barrier``
    parents come from earlier generations alone: whoever then waits for a generation to be finished before asking for
    the next one gets the same candidates from any number of workers.

    Raises ConfigError where the sizes contradict each other.
    """

    def __init__(
        self,
        space: SearchSpace | None = None,
        *,
        preset: str = "adopt",
        population_size: int | None = None,
        parents: int | None = None,
        mutation: int | None = None,
        crossover: int | None = None,
        mutation_probability: float | None = None,
        stage_one_generations: int | None = None,
        barrier: bool = False,
        seed: int | None = 0,
    ) -> None:
        given = {
            "population_size": population_size,
            "parents": parents,
            "mutation": mutation,
            "crossover": crossover,
            "mutation_probability": mutation_probability,
            "stage_one_generations": stage_one_generations,
        }
        if seed is not None and seed < 0:
            raise ConfigError(f"seed {seed} must not be negative")
        self.space = space
        self.barrier = barrier
        self.settings = settings_of(preset, {name: value for name, value in given.items() if value is not None})
        self.seed = secrets.randbits(32) if seed is None else seed
        self._salt = 0
        # None changes a proposal: finished trials as read, recent proposals for ``proposal``, and histories so far.
        self._records: dict[tuple[str, int], tuple[datetime, Record | None]] = {}
        self._proposed: dict[tuple[str, int], Proposal] = {}
        self._readers: dict[str, HistoryReader] = {}

    # What Optuna calls

    def reseed_rng(self) -> None:
        """Turn to other random numbers; Optuna calls this in ``optimize(n_jobs=...)``."""
        self._salt += 1

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of ``space``, or those that every complete trial has in common."""
        if self.space is not None:
            return dict(self.space.distributions())
        common = intersection_search_space(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        return {name: distribution for name, distribution in common.items() if not distribution.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Parameters of the next candidate: ``steps`` and those of its own steps."""
        if not search_space:
            return {}
        trials = study.get_trials(deepcopy=False)
        if self.space is None or not _is_part(search_space, self.space.distributions()):
            return self._sample_generic(study, trials, trial.number, search_space)
        proposal = self._propose(self.space, study, trials, trial.number)
        given = trial.system_attrs.get("fixed_params")
        key = trial.user_attrs.get("candidate")
        if isinstance(key, str):
            try:
                cand = Candidate.from_key(key)
                if self.space.is_canonical(cand):
                    proposal = replace(proposal, candidate=cand)
            except ValueError:
                pass
        self._remember(study, trial.number, proposal)
        values = self.space.encode(proposal.candidate)
        return {name: value for name, value in values.items() if name in search_space}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Random value, the same for the same seed, index and name."""
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        index = trial.number - sum(t.number < trial.number for t in failed)
        return generic.draw(self._rng(index, INDEPENDENT, *param_name.encode()), param_distribution)

    # What the study runner asks

    def proposal(self, study: optuna.Study, number: int, trials: Sequence[FrozenTrial] | None = None) -> Proposal:
        """What trial ``number`` tries and where that came from; the trial may be running or finished.

        Exact for the last trials that this sampler proposed, and for any trial of a serial run. Of another worker's
        trial it tells what the trials before it, as they are now, lead to. ``trials``: all of the study's by number,
        just read, for one that is new; it is then proposed from them. Raises ConfigError without a space.
        """
        if self.space is None:
            raise ConfigError("a sampler without a space has no proposals; give it one")
        if trials is None:
            remembered = self._proposed.get((study.study_name, number))
            if remembered is not None:
                now = study.get_trials(deepcopy=False)
                mine = next((t for t in now if t.number == number), None)
                if mine is not None and "fixed_params" in mine.system_attrs:
                    vals = {**self.space.encode(remembered.candidate), **mine.system_attrs["fixed_params"]}
                    try:
                        return replace(remembered, operator="baseline", parents=(), candidate=self.space.decode(vals))
                    except (ConfigError, TypeError, ValueError, OverflowError) as error:
                        raise ConfigError(str(error)) from None
                return remembered
            trials = study.get_trials(deepcopy=False)
        earlier = trials[: bisect_left(trials, number, key=lambda trial: trial.number)]
        made = self._propose(self.space, study, earlier, number)
        for trial in trials[len(earlier) : len(earlier) + 1]:
            if trial.number == number and "fixed_params" in trial.system_attrs:
                enqueued = self._decode(parameters(trial))
                made = replace(made, operator="baseline", parents=(), candidate=enqueued or made.candidate)
        self._remember(study, number, made)
        return made

    def enqueued(self, study: optuna.Study, trial: FrozenTrial) -> Candidate:
        """What a waiting trial tries: parameters that it was enqueued with, and proposals for all that it leaves open.

        Raises ConfigError for values that are no candidate's.
        """
        assert self.space is not None
        given, space = parameters(trial), self.space.distributions()
        known = self._decode(given)
        if known is not None:
            return known
        values = {**self.sample_relative(study, trial, space), **given}
        for name in space.keys() - values.keys():
            values[name] = self.sample_independent(study, trial, name, space[name])
        try:
            return self.space.decode(values)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"the enqueued parameters are no candidate: {error}") from None

    def read(self, study: optuna.Study) -> None:
        """Read the study's trials now, which takes seconds where it is long, rather than with the next proposal."""
        trials = study.get_trials(deepcopy=False)
        if self.space is not None:
            self._history(study, trials, len(trials))

    def describe(self, study: optuna.Study, number: int) -> dict[str, Any]:
        """``proposal`` without its candidate, as JSON: {generation, stage, operator, share, parents}."""
        proposal = asdict(self.proposal(study, number))
        del proposal["candidate"]
        return {**proposal, "parents": list(proposal["parents"])}

    # How a candidate is made

    def _propose(self, space: SearchSpace, study: optuna.Study, trials: Sequence[FrozenTrial], number: int) -> Proposal:
        size = self.settings.population_size
        history = self._history(study, trials, number)
        generation = history.index // size
        if self.barrier:
            history = history.before(generation * size)
        stage, share = self._stage(space, history, generation)
        rng = self._rng(history.index, RELATIVE)
        elite = best(self._niche(rng, space, history.ranked), self.settings.parents)
        operator = self._operator(history.index)
        wanted = self._litter(operator, study)
        children: dict[Candidate, tuple[str, tuple[int, ...]]] = {}
        for name in self._attempts(operator, wanted):
            if len(children) == wanted or (children and name == "random"):
                break
            candidate, origin, parents = self._make(rng, space, name, elite, generation, share)
            if candidate.key not in history.taken:
                children.setdefault(candidate, (origin, parents))
        if not children:  # nothing new is left near here: a repeat is allowed
            children[candidate] = (origin, parents)
        chosen = surrogate.choose(list(children), history.ranked, space)
        return Proposal(chosen, generation, stage, children[chosen][0], share, children[chosen][1])

    def _niche(self, rng: Generator, space: SearchSpace, ranked: list[Record]) -> list[Record]:
        """Trials that share one value of one choice, mostly that of the best trial; all without choices.

        Each solver has timesteps of its own. Where parents come only from the best trials of all, the solver that
        was lucky first crowds out the others before theirs are found.
        """
        if not (space.choices and ranked and self.settings.local) or len(ranked[0].losses) > 1:
            return ranked
        name = list(space.choices)[int(rng.integers(len(space.choices)))]
        values = list(dict.fromkeys(record.candidate.settings_dict[name] for record in ranked))
        chosen = values[min(int(rng.geometric(1 - NEXT_NICHE)), len(values)) - 1]
        return [record for record in ranked if record.candidate.settings_dict[name] == chosen]

    def _litter(self, operator: str, study: optuna.Study) -> int:
        """Children to choose one from. A random candidate has no rivals, or it would not be random."""
        bred = operator in ("mutation", "crossover") and len(study.directions) == 1
        return self.settings.children if bred else 1

    def _stage(self, space: SearchSpace, history: History, generation: int) -> tuple[int, float]:
        """Stage (1 or 2) and the largest share of units that a step may skip."""
        if not space.skip_limit(space.max_skip):
            return 1, 0.0
        if not space.stage_one_possible:
            return 2, space.max_skip
        longest = self.settings.stage_one_generations
        bests = bests_by_generation(history, self.settings.population_size, min(generation, longest))
        start = stage_two_start(bests, longest)
        share = share_at(generation, start, space.max_skip)
        return 2 if share else 1, share

    def _operator(self, index: int) -> str:
        """Operator by place in the generation, so that each generation has exact numbers of each."""
        generation, place = divmod(index, self.settings.population_size)
        if index == 0:
            return "uniform"
        if generation == 0:
            return "random" if place <= self.settings.population_size // 2 else "mutation"
        if place < self.settings.mutation:
            return "mutation"
        return "crossover" if place < self.settings.mutation + self.settings.crossover else "random"

    def _attempts(self, operator: str, wanted: int) -> list[str]:
        """Operators to try until they have made ``wanted`` new candidates, or one at least."""
        tries = max(OPERATOR_TRIES, 2 * wanted)
        # Parents that differ in one gene have no new child; a local move is then worth more than chance.
        instead = ["mutation"] * tries if operator == "crossover" and self.settings.local else []
        return [operator] * tries + instead + ["random"] * RANDOM_TRIES

    def _make(
        self,
        rng: Generator,
        space: SearchSpace,
        operator: str,
        elite: Sequence[Record],
        generation: int,
        share: float,
    ) -> tuple[Candidate, str, tuple[int, ...]]:
        """One try of an operator: (candidate, operator, parents); random where it has no parents."""
        local = self.settings.local
        if operator == "uniform":
            return _uniform(space, share), operator, ()
        if operator == "mutation" and generation == 0 and not (local and elite):
            start = _uniform(space, share)
            if local:
                return operators.mutate_local(rng, space, start, share), operator, ()
            return operators.mutate_paper(rng, space, start, share, UNIFORM_MUTATION), operator, ()
        if operator == "random" or not elite:
            return operators.random_candidate(rng, space, share), "random", ()
        first = self._select(rng, elite)
        if operator == "mutation":
            if local:
                child = operators.mutate_local(rng, space, first.candidate, share)
            else:
                probability = self.settings.mutation_probability
                child = operators.mutate_paper(rng, space, first.candidate, share, probability)
            return child, operator, (first.number,)
        second = self._select(rng, elite)
        cross = operators.crossover_prefix if local else operators.crossover_uniform
        child = cross(rng, space, first.candidate, second.candidate, share)
        return child, operator, (first.number, second.number)

    def _select(self, rng: Generator, elite: Sequence[Record]) -> Record:
        """One of the best trials, with replacement: the best of ``tournament`` draws."""
        return elite[int(rng.integers(len(elite), size=self.settings.tournament).min())]

    def _sample_generic(
        self,
        study: optuna.Study,
        trials: Sequence[FrozenTrial],
        number: int,
        search_space: Mapping[str, BaseDistribution],
    ) -> dict[str, Any]:
        settings, directions = self.settings, study.directions
        index = number - sum(t.state == TrialState.FAIL and t.number < number for t in trials)
        complete = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
        # Several objectives are ranked by their first here: only our own space has Pareto ranks.
        complete.sort(key=lambda t: (losses(t.values, directions), t.number))
        breed = index >= settings.population_size and self._operator(index) != "random"
        parents = complete[: settings.parents] if breed else []
        return generic.child(self._rng(index, GENERIC), search_space, parents, settings.mutation_probability)

    # Helpers

    def _rng(self, index: int, *stream: int) -> Generator:
        return np.random.default_rng([self.seed, self._salt, index, *stream])

    def _history(self, study: optuna.Study, trials: Sequence[FrozenTrial], number: int) -> History:
        """What the trials say; each finished one is decoded once, for it never changes again."""
        name, directions, known = study.study_name, study.directions, self._records
        reader = self._readers.setdefault(name, HistoryReader())

        def record_of(trial: FrozenTrial) -> Record | None:
            finished_at = trial.datetime_complete
            place = (name, trial.number)
            if finished_at is not None:
                stored = known.get(place)
                if stored is not None and stored[0] == finished_at:
                    return stored[1]
            record = self._record(trial, directions)
            if finished_at is not None:
                known[place] = (finished_at, record)
            return record

        return reader.history(trials, number, record_of)

    def _record(self, trial: FrozenTrial, directions: Sequence[StudyDirection]) -> Record | None:
        candidate = self._decode(parameters(trial))
        if candidate is None and not trial.state.is_finished():
            try:
                candidate = Candidate.from_key(trial.user_attrs["candidate"])
            except Exception:
                candidate = None
        if candidate is None:
            return None
        complete = trial.state == TrialState.COMPLETE and trial.values
        values = losses(trial.values, directions) if complete else ()
        return Record(values, trial.number, candidate.key, candidate)

    def _decode(self, params: Mapping[str, Any]) -> Candidate | None:
        """Candidate of parameter values, None where they are incomplete or not ours."""
        assert self.space is not None
        try:
            return self.space.decode(params)
        except (ConfigError, TypeError, ValueError, OverflowError):
            return None

    def _remember(self, study: optuna.Study, number: int, proposal: Proposal) -> None:
        self._proposed[study.study_name, number] = proposal
        while len(self._proposed) > REMEMBERED:
            self._proposed.pop(next(iter(self._proposed)), None)


def _uniform(space: SearchSpace, share: float) -> Candidate:
    """DDIM's uniform schedule with the most steps that the budget allows in full."""
    pairs = [(timestep, 0) for timestep in uniform_timesteps(space.T, space.full_steps)]
    return space.fit(space.repair(pairs), share)


def _is_part(search_space: Mapping[str, BaseDistribution], ours: Mapping[str, BaseDistribution]) -> bool:
    return all(ours.get(name) == distribution for name, distribution in search_space.items())
