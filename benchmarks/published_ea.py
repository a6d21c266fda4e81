"""The evolutionary search of AutoDiffusion (arXiv 2309.10438) as its code has it, as an Optuna sampler.

It is the search of the unconditional models: 49 candidates, then nine generations of 50, which is 499. What is odd in
it is kept, since it is what was published and what its figures come from:

- candidates are unsorted lists, and two orders of the same timesteps are two candidates, both evaluated;
- the uniform list begins in the order of a Python set, so that crossover by position mixes unlike steps;
- crossover leaves repeated timesteps in a child, which then has fewer steps (``timesteps_of``);
- a mutation may change nothing, and is then dropped as one that was seen;
- parents come from an archive of all that was ever evaluated, and a lucky score stays there unquestioned: each
  candidate is to be scored on noise of its own, which is for whoever evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna import SearchSpace
from autodiffusion_optuna.search.timesteps import uniform_timesteps

CANDIDATES = 499
POPULATION, ARCHIVE = 50, 10
MUTANTS, CROSSED = 25, 10
"""Of a generation; what is left of the 50 is drawn at random."""
PROBABILITY, FIRST_PROBABILITY = 0.25, 0.1
"""Of each timestep of a mutant, in a generation and in the first population."""
TRIES = 10
"""A child that was seen before is made again, up to so many times the number wanted."""

Genes = tuple[int, ...]


def name_of(step: int) -> str:
    """The parameter of a step, as ``SearchSpace`` has it."""
    return f"t_{step:02d}"


def genes_of(params: Mapping[str, Any]) -> Genes:
    """A trial's unsorted list."""
    return tuple(int(params[name_of(i)]) for i in range(len(params)))


def timesteps_of(params: Mapping[str, Any]) -> Genes:
    """What the published code samples with: each timestep once, descending, perhaps fewer than the list is long."""
    return tuple(sorted(set(genes_of(params)), reverse=True))


class PublishedEA(BaseSampler):
    """The published search for the timesteps of a space with a fixed number of steps and nothing else.

    Serial: a generation is bred when the one before it is finished. ``seed``: of all draws.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space = space
        self.rng = np.random.default_rng(seed)
        self.seen: set[Genes] = set()
        self.waiting: list[Genes] = []

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of the space."""
        return self.space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next of the generation."""
        if not self.waiting:
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            best = sorted(complete, key=lambda t: (t.value, t.number))[:ARCHIVE]
            self.waiting = self.breed([genes_of(t.params) for t in best]) if best else self.begin()
        return {name_of(i): gene for i, gene in enumerate(self.waiting.pop(0))}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Any value, of a parameter that the space does not have."""
        drawn = RandomSampler(int(self.rng.integers(2**31)))
        return drawn.sample_independent(study, trial, param_name, param_distribution)

    def begin(self) -> list[Genes]:
        """Uniform, random lists up to half the population, and mutants of uniform."""
        uniform = tuple(set(uniform_timesteps(self.space.T, self.space.max_steps)))
        self.seen.add(uniform)
        found = self.filled([uniform], POPULATION // 2)
        mutants = POPULATION - POPULATION // 2 - 1
        return found + self.children(lambda: self.mutated(uniform, FIRST_PROBABILITY), mutants)

    def breed(self, parents: list[Genes]) -> list[Genes]:
        """A generation: mutants, then crossings, then random lists up to the population."""

        def parent() -> Genes:
            return parents[int(self.rng.integers(len(parents)))]

        found = self.children(lambda: self.mutated(parent(), PROBABILITY), MUTANTS)
        found += self.children(lambda: self.crossed(parent(), parent()), CROSSED)
        return self.filled(found, POPULATION)

    def children(self, make: Callable[[], Genes], wanted: int) -> list[Genes]:
        """Children that were not seen before, fewer than wanted where too many were."""
        found: list[Genes] = []
        for _ in range(TRIES * wanted):
            child = make()
            if len(found) < wanted and child not in self.seen:
                self.seen.add(child)
                found.append(child)
        return found

    def filled(self, found: list[Genes], size: int) -> list[Genes]:
        """With random lists up to ``size``."""
        while len(found) < size:
            drawn = tuple(self.rng.permutation(self.space.T)[: self.space.max_steps].tolist())
            if drawn not in self.seen:
                self.seen.add(drawn)
                found = [*found, drawn]
        return found

    def mutated(self, parent: Genes, probability: float) -> Genes:
        """Each timestep replaced with a probability by one that the list does not hold."""
        genes = list(parent)
        for i in range(len(genes)):
            if self.rng.random() < probability:
                free = [t for t in range(self.space.T) if t not in genes]
                genes[i] = free[int(self.rng.integers(len(free)))]
        return tuple(genes)

    def crossed(self, first: Genes, second: Genes) -> Genes:
        """Each position from one of the two; repeats stay."""
        return tuple(a if self.rng.random() < 0.5 else b for a, b in zip(first, second, strict=True))
