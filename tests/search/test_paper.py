"""The published search: sizes, operators, parents and the two stages."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable

import optuna
import pytest
from search_spaces import SPACES, units

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search.evolution import Proposal
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace

TARGET = (870, 610, 330, 90)


def distance(candidate: Candidate) -> float:
    """Stub score with its minimum at TARGET."""
    return sum(abs(t - goal) for t, goal in zip(candidate.timesteps, TARGET, strict=True)) + 0.5


def run(
    space: SearchSpace, trials: int, score: Callable[[int, Candidate], float], **settings: int
) -> tuple[optuna.Study, list[Proposal]]:
    sampler = AutoDiffusionSampler(space, preset="paper", **settings)
    study = optuna.create_study(sampler=sampler)
    proposals = []
    for number in range(trials):
        trial = study.ask()
        candidate = space.suggest(trial)
        proposals.append(sampler.proposal(study, number))
        assert proposals[-1].candidate == candidate
        study.tell(trial, score(number, candidate))
    return study, proposals


@pytest.fixture(scope="module")
def paper() -> tuple[optuna.Study, list[Proposal]]:
    return run(SPACES["fixed"], 300, lambda number, candidate: distance(candidate))


def test_counts_in_each_generation() -> None:
    # Scores without any order keep the parents apart. Where they grow alike, crossover has no new child left,
    # and its place goes to a random candidate.
    _, proposals = run(SPACES["fixed"], 300, lambda number, candidate: zlib.crc32(candidate.key.encode()))
    counts = Counter((p.generation, p.operator) for p in proposals)
    assert (counts[0, "uniform"], counts[0, "random"], counts[0, "mutation"]) == (1, 25, 24)
    assert proposals[0].candidate.timesteps == (750, 500, 250, 0)
    for generation in range(1, 6):
        in_turn = [p.operator for p in proposals if p.generation == generation]
        assert in_turn == ["mutation"] * 25 + ["crossover"] * 15 + ["random"] * 10


def test_mutants_of_uniform_in_generation_zero_share_most_genes(
    paper: tuple[optuna.Study, list[Proposal]],
) -> None:
    _, proposals = paper
    mutants = [p.candidate for p in proposals[:50] if p.operator == "mutation"]
    shared = [len({750, 500, 250, 0} & {*candidate.timesteps}) for candidate in mutants]
    assert max(shared) == 3
    assert sum(s == 3 for s in shared) > 15


def test_parents_are_in_the_top_ten_of_what_was_finished(paper: tuple[optuna.Study, list[Proposal]]) -> None:
    study, proposals = paper
    values = [trial.value for trial in study.trials]
    used = Counter[int]()
    for number, proposal in enumerate(proposals):
        ranked = sorted(range(number), key=lambda n: (values[n], n))
        places = [ranked.index(parent) for parent in proposal.parents]
        assert all(place < 10 for place in places)
        used.update(places)
    assert set(used) == set(range(10))  # drawn from all ten


def test_nothing_is_tried_twice_and_the_search_improves(paper: tuple[optuna.Study, list[Proposal]]) -> None:
    study, proposals = paper
    assert len({p.candidate.key for p in proposals}) == 300
    assert study.best_value < 0.25 * (study.trials[0].value or 0)
    assert {p.stage for p in proposals} == {1}


SKIPS = SearchSpace(1000, 4, 4, units=units(100), max_skip=0.1)


def test_stage_two_ramps_as_published_when_every_generation_improves() -> None:
    _, proposals = run(SKIPS, 88, lambda number, candidate: -float(number), population_size=8)
    ratios = [proposals[8 * generation].skip_ratio for generation in range(11)]
    assert ratios == pytest.approx([0, 0, 0, 0, 0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    for proposal in proposals:
        most = max(skip.bit_count() for skip in proposal.candidate.modes)
        assert most <= round(100 * proposal.skip_ratio)
        assert proposal.stage == (2 if proposal.generation >= 5 else 1)
    assert max(skip.bit_count() for p in proposals[80:] for skip in p.candidate.modes) > 5


@pytest.mark.parametrize(("last_improvement", "start"), [(0, 2), (1, 3), (2, 4), (3, 5), (7, 5)])
def test_stage_two_starts_early_when_the_best_stays(last_improvement: int, start: int) -> None:
    def score(number: int, candidate: Candidate) -> float:
        return -float(min(number // 8, last_improvement) * 10) + (number % 8 > 0)

    _, proposals = run(SKIPS, 64, score, population_size=8)
    first = min(p.generation for p in proposals if p.stage == 2)
    assert first == start
    assert proposals[8 * start].skip_ratio == pytest.approx(0.02)


def test_skips_are_open_from_the_start_where_all_layers_are_too_expensive() -> None:
    space = SPACES["only with skips"]
    _, proposals = run(space, 24, lambda number, candidate: space.cost(candidate), population_size=8)
    assert {(p.stage, p.skip_ratio) for p in proposals} == {(2, 0.2)}
    assert all(space.cost(p.candidate) <= 5.4 + 1e-9 for p in proposals)
