"""AutoDiffusionSampler: the two-stage evolutionary search as an Optuna sampler."""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import optuna
from numpy.random import Generator
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.evolution import Proposal, next_start, propose
from autodiffusion_optuna.search.history import HistoryReader, published, tried
from autodiffusion_optuna.search.presets import settings_of
from autodiffusion_optuna.search.space import SearchSpace

RELATIVE, INDEPENDENT = 1, 2  # streams of randomness; none is 0: SeedSequence takes [..., 0] for [...]


class AutoDiffusionSampler(BaseSampler):
    """Evolutionary search for timesteps, then also for skipped layers (AutoDiffusion, arXiv 2309.10438).

    ``space``: what is searched; other parameters, and without it all, are drawn at random. ``preset``: "adopt" (ours)
    or "paper" (the published operators and sizes); every other argument left at None is the preset's, scaled to
    ``population_size`` where that is given. ``seed``: None draws one, once.

    The state of the search is the study's trials and nothing else: each proposal is a function of them, the seed and
    the trial's index, so resumed runs and other processes repeat exactly and workers need no seeds of their own. The
    index is the number of earlier trials that did not fail; it decides the generation (``index // population_size``)
    and, by its place there, the operator. With ``barrier`` parents come from earlier generations alone: whoever waits
    for a generation to be finished before asking for the next gets the same candidates from any number of workers.
    ``thrifty``: whoever scores keeps the network's answers at first steps (a prefix cache), so of the children of
    "adopt" those are preferred that share more of them with what was tried. ``starts``: candidates to try besides what
    is enqueued, in their order, at every second place until none is left: better children soon let a pruner stop those
    that are no good. Trials that plain Optuna begins at the same moment may try the same one.

    Raises ConfigError where the sizes contradict each other, and for starts that are no canonical candidates of the
    space.
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
        thrifty: bool = False,
        starts: Sequence[Candidate] = (),
        seed: int | None = 0,
    ) -> None:
        if seed is not None and seed < 0:
            raise ConfigError(f"seed {seed} must not be negative")
        self.space, self.barrier, self.thrifty = space, barrier, thrifty
        self.offer(starts)
        self.settings = settings_of(
            preset,
            population_size=population_size,
            parents=parents,
            mutation=mutation,
            crossover=crossover,
            mutation_probability=mutation_probability,
            stage_one_generations=stage_one_generations,
        )
        self.seed = secrets.randbits(32) if seed is None else seed
        self._salt = 0
        # Neither decides a proposal: finished trials as read, and what was proposed, for ``proposal``.
        self._reader = HistoryReader()
        self._proposed: dict[tuple[str, int], Proposal] = {}

    def offer(self, starts: Iterable[Candidate]) -> None:
        """Have other ``starts``; ConfigError for one that is no canonical candidate of the space."""
        self.starts = tuple(starts)
        for start in self.starts:
            if self.space is None or not self.space.is_canonical(start):
                raise ConfigError(
                    f"start {start.key} is no candidate of the space"
                    + (", for there is none; give one" if self.space is None else "; give what space.fit makes of it")
                )

    def reseed_rng(self) -> None:
        """Turn to other random numbers; Optuna calls this in ``optimize(n_jobs=...)``."""
        self._salt += 1

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of ``space``."""
        return {} if self.space is None else self.space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Parameters of the next candidate, or of the one whose key the trial carries; others are random."""
        ours = self.infer_relative_search_space(study, trial)
        foreign = {name: d for name, d in search_space.items() if ours.get(name) != d}
        params = {name: self.sample_independent(study, trial, name, d) for name, d in foreign.items()}
        if self.space is None or len(foreign) == len(search_space):
            return params
        candidate = published(trial, self.space)
        if candidate is None:
            candidate = self._propose(self.space, study, study.get_trials(deepcopy=False), trial.number).candidate
        values = self.space.encode(candidate)
        return params | {name: values[name] for name in search_space if name in values and name not in foreign}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Random value, the same for the same seed, index and name."""
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        index = trial.number - sum(t.number < trial.number for t in failed)
        seed = int(self._rng(index, INDEPENDENT, *param_name.encode()).integers(2**32))
        return RandomSampler(seed).sample_independent(study, trial, param_name, param_distribution)

    def proposal(self, study: optuna.Study, number: int) -> Proposal:
        """What trial ``number`` tries and where that came from; it may be the next one, running or finished.

        The candidate is the one that ``space.suggest`` decodes: parameters that the trial has or was enqueued with, and
        for those left open the candidate whose key it carries, else the proposed one. The rest is what is stored with
        the trial or was proposed here, else what the trials before it, as they are now, lead to. Operator "baseline":
        it was enqueued, or is one of ``starts``; "unknown": it tries another candidate. Raises ConfigError for values
        that are no candidate's.
        """
        if self.space is None:
            raise ConfigError("a sampler without a space has no proposals; give it one")
        trials = study.get_trials(deepcopy=False)
        place = bisect_left(trials, number, key=lambda trial: trial.number)
        if place == len(trials):
            return self._propose(self.space, study, trials, number)
        trial = trials[place]
        stored = Proposal.from_attrs(published(trial, self.space), trial.user_attrs)
        made = stored or self._proposed.get((study.study_name, number))
        made = made or self._propose(self.space, study, trials[:place], number)
        candidate = tried(trial, self.space, made.candidate, partial(self.sample_independent, study, trial))
        enqueued = "fixed_params" in trial.system_attrs
        if enqueued or candidate != made.candidate:
            known = enqueued or candidate in self.starts
            made = replace(made, candidate=candidate, operator="baseline" if known else "unknown", parents=())
        return made

    def read(self, study: optuna.Study) -> None:
        """Read the study's trials now, which takes a while where it is long, rather than with the next proposal."""
        if self.space is not None:
            trials = study.get_trials(deepcopy=False)
            self._reader.history(self.space, study, trials, len(trials))

    def _propose(self, space: SearchSpace, study: optuna.Study, trials: Sequence[FrozenTrial], number: int) -> Proposal:
        history = self._reader.history(space, study, trials, number)
        rng = self._rng(history.index, RELATIVE)
        proposal = next_start(history, space, self.settings, self.starts) or propose(
            history, space, self.settings, rng, barrier=self.barrier, thrifty=self.thrifty, started=bool(self.starts)
        )
        self._proposed[study.study_name, number] = proposal
        return proposal

    def _rng(self, index: int, *stream: int) -> Generator:
        return np.random.default_rng([self.seed, self._salt, index, *stream])
