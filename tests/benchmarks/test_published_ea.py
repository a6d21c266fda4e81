"""The published search is as it was published: proportions, archive, duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler
from published_ea import CANDIDATES, Genes, PublishedEA, genes_of, name_of, timesteps_of

from autodiffusion_optuna import SearchSpace

SPACE = SearchSpace(T=1000, min_steps=4, max_steps=4)
UNIFORM = {750, 500, 250, 0}


def params_of(*genes: int) -> dict[str, int]:
    return {name_of(i): gene for i, gene in enumerate(genes)}


def same_places(first: Genes, second: Genes) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


def searched(ea: PublishedEA, trials: int, value: Any) -> list[Genes]:
    study = optuna.create_study(sampler=ea)
    for _ in range(trials):
        trial = study.ask()
        SPACE.suggest(trial)
        study.tell(trial, value(trial.number))
    return [genes_of(trial.params) for trial in study.trials]


def test_the_first_population_is_uniform_random_and_close_to_uniform() -> None:
    first = PublishedEA(SPACE, seed=0).begin()
    assert len(first) == 49
    assert CANDIDATES == 49 + 9 * 50
    assert set(first[0]) == UNIFORM
    shared = [same_places(genes, first[0]) for genes in first[1:]]
    assert max(shared[:24]) <= 1  # random
    assert min(shared[24:]) >= 2  # a tenth of the timesteps changed
    assert max(shared) < 4


def test_a_generation_is_half_mutants_a_fifth_crossings_and_the_rest_random() -> None:
    ea = PublishedEA(SPACE, seed=1)
    parents = [(1, 2, 3, 4), (11, 12, 13, 14)]
    ea.seen |= set(parents)
    made = ea.breed(parents)
    places = [set(place) for place in zip(*parents, strict=True)]
    kept = [sum(gene in place for gene, place in zip(genes, places, strict=True)) for genes in made]
    assert len(made) == 50
    assert sum(share < 4 for share in kept[:25]) == 25  # each mutant has a timestep that neither parent has
    assert min(kept[:25]) >= 1
    assert kept[25:35] == [4] * 10
    assert max(kept[35:]) <= 1


def test_a_mutant_that_changed_nothing_is_dropped_as_seen() -> None:
    ea = PublishedEA(SPACE, seed=0)
    ea.seen.add((1, 2, 3, 4))
    assert ea.children(lambda: (1, 2, 3, 4), 5) == []


def test_a_fourth_of_the_timesteps_of_a_mutant_change() -> None:
    ea = PublishedEA(SPACE, seed=0)
    changed = [4 - same_places(ea.mutated((1, 2, 3, 4), 0.25), (1, 2, 3, 4)) for _ in range(2000)]
    assert np.mean(changed) == pytest.approx(1, abs=0.06)
    assert sum(count == 0 for count in changed) / 2000 == pytest.approx(0.316, abs=0.04)  # 0.75 to the fourth


def test_another_order_is_another_candidate() -> None:
    ea = PublishedEA(SPACE, seed=0)
    ea.seen.add((1, 2, 3, 4))
    assert ea.children(lambda: (4, 3, 2, 1), 1) == [(4, 3, 2, 1)]


def test_crossing_leaves_repeats_and_the_candidate_has_fewer_steps() -> None:
    ea = PublishedEA(SPACE, seed=0)
    children = {ea.crossed((1, 2, 3, 4), (4, 3, 2, 1)) for _ in range(50)}
    assert (1, 3, 3, 1) in children
    assert timesteps_of(params_of(1, 3, 3, 1)) == (3, 1)
    assert timesteps_of(params_of(7, 900, 31, 5)) == (900, 31, 7, 5)


def test_parents_are_the_best_ten_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    ea, bred = PublishedEA(SPACE, seed=0), []
    breed = ea.breed
    monkeypatch.setattr(ea, "breed", lambda parents: bred.append(parents) or breed(parents))
    # The tenth to the nineteenth trial are the best, and a lucky one of the second generation is better still.
    tried = searched(ea, 49 + 50 + 1, lambda number: -1.0 if number == 70 else abs(number - 10) + 0.5)
    assert bred[0][0] == tried[10]
    assert set(bred[0]) == {tried[n] for n in range(6, 15)} | {tried[5]}
    assert bred[1][0] == tried[70]
    assert set(bred[1][1:]) == set(bred[0][:9])


def test_the_same_seed_is_the_same_search() -> None:
    first, again, other = (searched(PublishedEA(SPACE, seed), 60, lambda number: number % 7) for seed in (3, 3, 4))
    assert first == again != other


def test_a_foreign_parameter_is_drawn_at_random() -> None:
    study = optuna.create_study(sampler=PublishedEA(SPACE, 0))
    assert 0 <= study.ask().suggest_float("other", 0, 1) <= 1
    assert isinstance(study.sampler, PublishedEA)
    assert not isinstance(study.sampler, RandomSampler)
