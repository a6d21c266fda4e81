"""Candidates against a fine run of the model, on the same noise."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from load_source import load_source

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.prefix_cache import PrefixCache
from autodiffusion_optuna.evaluation.references.reference import Reference
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.screen import Screen, whitening_of
from autodiffusion_optuna.evaluation.solvers import evaluations, query_steps
from autodiffusion_optuna.evaluation.teacher import teacher_images
from autodiffusion_optuna.search.ranks import rank_correlation
from autodiffusion_optuna.search.repair import spread
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.timesteps import baseline_timesteps, log_snr
from autodiffusion_optuna.study.starts import screen_timesteps

CANDIDATE = Candidate((900, 500, 100))
FINE = log_snr(load_source("mixture").schedule, 25)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    model = load_source("mixture")
    extractor = load_extractor("pixels", model.device)
    assert model.reference is not None
    return Evaluator(
        model, Sampling(), extractor, model.reference(extractor), batch=32, screen_images=16, screen_timesteps=FINE
    )


def reference_of(features: torch.Tensor) -> Reference:
    rows = features.to(torch.float64)
    return Reference(rows.mean(dim=0), torch.cov(rows.T), len(rows), "test", "test", "test")


def drawn(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * torch.logspace(0, -3, dim)


def test_many_images_are_whitened_to_unit_variance() -> None:
    features = drawn(100_000, 8) + drawn(100_000, 8, 1)[:, :1]  # neither of one size nor independent
    features[:, 1:] += 0.3 * drawn(100_000, 7, 2) / torch.logspace(0, -3, 7)
    whitening = whitening_of(reference_of(features))
    covariance = torch.cov((features.to(torch.float64) @ whitening.T).T)
    assert covariance == pytest.approx(torch.eye(8, dtype=torch.float64), abs=0.02)


def test_few_images_for_many_features_leave_no_feature_that_drowns_the_others() -> None:
    reference = reference_of(drawn(40, 300))
    squared = whitening_of(reference).square().sum(dim=0)  # of each feature, what a unit of it counts
    assert bool(squared.isfinite().all())
    assert float(squared.max() * reference.sigma.trace() / 300) < 2


def test_an_unknown_number_of_images_is_that_of_the_rank() -> None:
    reference = reference_of(drawn(40, 100))
    found = [w.T @ w for w in (whitening_of(reference), whitening_of(replace(reference, n=None)))]
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05 * float(found[0].abs().max()))


def test_distances_are_squared_lengths_image_by_image() -> None:
    teacher, student = drawn(6, 8, 1), drawn(6, 8, 2)
    reference = reference_of(drawn(1000, 8))
    screen = Screen.of(teacher, reference)
    away = (student - teacher).to(torch.float64)
    metric = whitening_of(reference)
    wanted = ((away @ metric.T) ** 2).sum(dim=1).tolist()
    assert screen.distances(student, 0) == pytest.approx(wanted)
    assert [*screen.distances(student[:4], 0), *screen.distances(student[4:], 4)] == pytest.approx(wanted)
    assert screen.distances(teacher, 0) == [0] * 6
    assert len(screen.distances(drawn(10, 8), 4)) == 2


def test_features_that_are_no_numbers_are_refused() -> None:
    screen = Screen.of(drawn(6, 8), reference_of(drawn(100, 8)))
    with pytest.raises(StatisticsError, match="NaN or infinity"):
        screen.distances(torch.full((6, 8), torch.nan), 0)


def test_the_screen_compares_the_first_images_with_the_teachers(evaluator: Evaluator) -> None:
    teacher = teacher_images(evaluator.images, 16, FINE)
    screen = evaluator.screen
    assert screen is not None
    assert teacher is not None
    assert screen.distances(evaluator.extractor(teacher), 0) == pytest.approx([0] * 16, abs=1e-9)
    score = evaluator.score(CANDIDATE, [64, 128], screen=screen)
    wanted = screen.distances(evaluator.extractor(evaluator.sample(CANDIDATE, 0, 16)), 0)
    assert score.screen == pytest.approx(wanted, rel=1e-4)


def test_finer_steps_are_nearer_to_the_teacher(evaluator: Evaluator) -> None:
    means = [
        statistics.fmean(evaluator.score(Candidate(timesteps), [32], screen=evaluator.screen).screen)
        for timesteps in ((900,), (900, 500, 100), tuple(range(975, -1, -75)))
    ]
    assert means[0] > means[1] > means[2] > 0


@pytest.mark.parametrize(("solver", "steps"), [("ddim", 20), ("dpmpp_2m", 10), ("dpmpp_2m", 20), ("heun", 8)])
def test_it_ranks_many_and_higher_order_steps_as_a_far_finer_run_does(
    evaluator: Evaluator, solver: str, steps: int
) -> None:
    """A teacher that is no nearer to the model than its candidates ranks them by how much they are like it."""
    model, nfe = evaluator.model, evaluations(solver, steps, "zero")
    space = SearchSpace(model.schedule.T, steps, steps, visits=lambda many, _: query_steps(solver, many, "zero"))
    studys = replace(evaluator, sampling=Sampling(solver), screen_timesteps=screen_timesteps(space, model.schedule))
    assert len(studys.screen_timesteps) <= max(2 * nfe, 16)
    finest = replace(studys, screen_timesteps=log_snr(model.schedule, 300)).screen
    rng, lists = np.random.default_rng(0), list(baseline_timesteps(model.schedule, steps).values())
    means = []
    for _ in range(30):
        one, other = rng.choice(len(lists), 2, replace=False)
        share = rng.random()
        between = share * np.array(lists[one]) + (1 - share) * np.array(lists[other])
        features = evaluator.extractor(studys.sample(Candidate(spread(between.astype(int), 1000)), 0, 16))
        means.append([statistics.fmean(screen.distances(features, 0)) for screen in (studys.screen, finest) if screen])
    assert rank_correlation(*zip(*means, strict=True)) > 0.95


def test_nothing_is_sampled_twice_and_values_stay_what_they_were(evaluator: Evaluator) -> None:
    plain = evaluator.score(CANDIDATE, [64, 128])
    screened = evaluator.score(CANDIDATE, [64, 128], screen=evaluator.screen)
    assert screened.run == plain.run == 3 * 128
    assert [images for images, _ in screened.rungs] == [64, 128]
    assert [v for _, v in screened.rungs] == pytest.approx([v for _, v in plain.rungs], rel=1e-5)  # other batches
    assert plain.screen == ()


def test_the_screen_can_end_the_evaluation(evaluator: Evaluator) -> None:
    seen: list[int] = []

    def stop(by_image: object) -> bool:
        seen.append(len(by_image))  # type: ignore[arg-type]
        return False

    score = evaluator.score(CANDIDATE, [64], screen=evaluator.screen, on_screen=stop, on_rung=lambda *_: True)
    assert seen == [16]
    assert (score.images, score.complete, score.rungs, score.run) == (16, False, (), 3 * 16)
    assert score.value == pytest.approx(statistics.fmean(score.screen))


def test_a_screen_larger_than_a_batch_takes_several(evaluator: Evaluator) -> None:
    small = replace(evaluator, batch=5)
    score = small.score(CANDIDATE, [32], screen=small.screen)
    assert score.screen == pytest.approx(evaluator.score(CANDIDATE, [32], screen=evaluator.screen).screen, rel=1e-3)


def test_candidates_share_first_steps_at_the_screen_and_after_it(evaluator: Evaluator) -> None:
    cached = replace(evaluator, prefix_cache=PrefixCache(2**28))
    first = cached.score(CANDIDATE, [64], screen=cached.screen)
    other = Candidate((900, 500, 50))
    second = cached.score(other, [64], screen=cached.screen)
    assert (first.saved, second.saved) == (0, 2 * 64)
    uncached = evaluator.score(other, [64], screen=evaluator.screen)
    assert (second.value, second.screen) == (uncached.value, uncached.screen)


def test_without_screen_images_there_is_no_screen(evaluator: Evaluator) -> None:
    assert replace(evaluator, screen_images=0).screen is None
