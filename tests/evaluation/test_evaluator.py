from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from load_source import load_source

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError, ModelError, StatisticsError
from autodiffusion_optuna.evaluation.evaluator import SHARE_OF_MEMORY, Evaluator, batch_for, largest_batch
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.frechet import frechet_distance
from autodiffusion_optuna.evaluation.prefix_cache import PrefixCache
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.solvers import SOLVERS
from autodiffusion_optuna.search.operators import mutate_local, random_candidate
from autodiffusion_optuna.search.space import SearchSpace

CANDIDATE = Candidate((900, 500, 100))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    model = load_source("mixture")
    extractor = load_extractor("pixels", model.device)
    assert model.reference is not None
    return Evaluator(model, Sampling(), extractor, model.reference(extractor), batch=32)


def test_the_value_is_the_distance_of_the_images(evaluator: Evaluator) -> None:
    score = evaluator.score(CANDIDATE, [100])
    images = evaluator.sample(CANDIDATE, 0, 100)
    assert images.dtype == torch.uint8
    assert score.value == pytest.approx(frechet_distance(evaluator.extractor(images), evaluator.reference), rel=1e-9)
    assert (score.run, score.saved, score.images, score.complete) == (300, 0, 100, True)


def test_a_rung_extends_the_one_before_it(evaluator: Evaluator) -> None:
    climbed = evaluator.score(CANDIDATE, [32, 64, 128])
    assert [images for images, _ in climbed.rungs] == [32, 64, 128]
    assert climbed.run == 3 * 128
    for images, value in climbed.rungs:
        assert evaluator.score(CANDIDATE, [images]).value == value


def test_a_rung_can_end_the_evaluation(evaluator: Evaluator) -> None:
    seen: list[int] = []

    def stop(images: int, value: float) -> bool:
        seen.append(images)
        return images < 64

    score = evaluator.score(CANDIDATE, [32, 64, 128], on_rung=stop)
    assert seen == [32, 64]
    assert (score.images, score.complete, score.run) == (64, False, 3 * 64)


def test_the_batch_changes_nothing_but_rounding(evaluator: Evaluator) -> None:
    values = [replace(evaluator, batch=batch).score(CANDIDATE, [64]).value for batch in (1, 7, 64)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_banks_differ_and_seeds_differ(evaluator: Evaluator) -> None:
    values = {evaluator.score(CANDIDATE, [64], bank=bank).value for bank in range(4)}
    other = replace(evaluator, seed=1).score(CANDIDATE, [64]).value
    assert len(values | {other}) == 5


def running_out(evaluator: Evaluator, most: int) -> Evaluator:
    """The same evaluator on a device that holds ``most`` images."""
    denoiser = evaluator.model.denoiser

    def denoise(x: torch.Tensor, t: float, skip: int) -> torch.Tensor:
        if len(x) > most:
            raise torch.OutOfMemoryError
        return denoiser(x, t, skip)

    return replace(evaluator, model=replace(evaluator.model, denoiser=denoise))


def test_a_batch_that_does_not_fit_is_halved_and_changes_nothing_but_rounding(evaluator: Evaluator) -> None:
    small = running_out(evaluator, 9)
    score = small.score(CANDIDATE, [64])
    assert score.value == pytest.approx(evaluator.score(CANDIDATE, [64]).value, rel=1e-5)
    assert (score.run, small.fitting_batch) == (3 * 64, 8)
    assert small.score(CANDIDATE, [64]).value == score.value


def test_a_single_image_that_does_not_fit_is_an_error(evaluator: Evaluator) -> None:
    with pytest.raises(ModelError, match="out of memory with a single image"):
        running_out(evaluator, 0).score(CANDIDATE, [64])


def test_features_that_do_not_fit_are_taken_in_halves(evaluator: Evaluator) -> None:
    """The extractor has early maps of its own, for which a batch of the network may be too large."""
    network, most = evaluator.extractor.network, 9

    def extract(images: torch.Tensor) -> torch.Tensor:
        if len(images) > most:
            raise torch.OutOfMemoryError
        return network(images)

    small = replace(evaluator, extractor=replace(evaluator.extractor, network=extract), prefix_cache=PrefixCache(2**24))
    assert small.score(CANDIDATE, [64]).value == evaluator.score(CANDIDATE, [64]).value
    assert small.fitting_batch == evaluator.batch
    most = 0
    with pytest.raises(ModelError, match="out of memory with a single image"):
        small.score(CANDIDATE, [64])


def test_noise_is_kept_within_bounds(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 32 * 16 * 4
    monkeypatch.setattr("autodiffusion_optuna.evaluation.drawing.KEPT_NOISE", 2 * batch)
    other = replace(evaluator)  # has kept nothing yet
    for _ in range(2):
        assert other.score(CANDIDATE, [128]).value == evaluator.score(CANDIDATE, [128]).value
        assert other.images.noise_bytes == 2 * batch


@pytest.mark.parametrize(("most", "batch"), [(0, None), (1, 1), (9, 8)])
def test_a_device_that_holds_little_gets_what_it_holds(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch, most: int, batch: int | None
) -> None:
    """The memory of a GPU whose images take 100 bytes each, of which it has ``most`` to spare."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (most * 100 / SHARE_OF_MEMORY + 1, 10**9))
    model, seen = running_out(evaluator, most).model, []

    def denoise(x: torch.Tensor, t: float, skip: int) -> torch.Tensor:
        seen.append(len(x))
        return model.denoiser(x.cpu(), t, skip)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100 * seen[-1])
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
    there = replace(model, denoiser=denoise, device=torch.device("cuda"))
    if batch is None:
        with pytest.raises(ModelError, match="out of memory with a single image"):
            largest_batch(there)
    else:
        assert largest_batch(there) == batch


@pytest.mark.parametrize(
    ("free", "first", "each", "fitting"),
    [(1000, 100, 50, 8), (1000, 100, 1, 256), (10, 100, 50, 1), (10**6, 1, 1, 1024)],
)
def test_the_batch_that_fits_is_a_power_of_two(free: int, first: int, each: int, fitting: int) -> None:
    assert batch_for(free, first, each) == fitting


def test_noise_of_a_stochastic_solver_belongs_to_the_image(evaluator: Evaluator) -> None:
    noisy = replace(evaluator, sampling=Sampling(eta=1.0))
    values = [replace(noisy, batch=batch).score(CANDIDATE, [64]).value for batch in (7, 64)]
    assert values == pytest.approx([values[0]] * 2, rel=1e-5)
    assert values[0] != pytest.approx(evaluator.score(CANDIDATE, [64]).value, rel=1e-3)
    cached = replace(noisy, prefix_cache=PrefixCache(2**24))
    other = Candidate((900, 500, 90))
    assert cached.score(CANDIDATE, [64]).value == replace(noisy, prefix_cache=None).score(CANDIDATE, [64]).value
    score = cached.score(other, [64])
    assert score.value == noisy.score(other, [64]).value
    assert score.saved == 2 * 64


def test_a_candidate_chooses_its_solver(evaluator: Evaluator) -> None:
    cached = replace(evaluator, prefix_cache=PrefixCache(2**24))
    for solver in ("ddim", "heun", "dpmpp_2m", "ddim"):
        chosen = Candidate(CANDIDATE.timesteps, settings=(("final", "sigma_min"), ("solver", solver)))
        fixed = replace(evaluator, sampling=Sampling(solver, "sigma_min")).score(CANDIDATE, [64])
        assert cached.score(chosen, [64]).value == fixed.value


def test_guidance_of_an_unconditional_model_is_refused(evaluator: Evaluator) -> None:
    with pytest.raises(ConfigError, match="guidance 2 was given, but model 'mixture' has none"):
        replace(evaluator, sampling=Sampling(guidance=2.0)).score(CANDIDATE, [32])


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_scores_are_bit_equal_with_and_without_the_prefix_cache(evaluator: Evaluator, solver: str) -> None:
    """A search-like walk: one-gene changes of good candidates, several lengths, a cache that has to drop some."""
    space = SearchSpace(T=1000, min_steps=2, max_steps=5)
    rng = np.random.default_rng(0)
    budget = 40 * 32 * 16 * 4  # forty of the batches' tensors
    cached = replace(evaluator, sampling=Sampling(solver), prefix_cache=PrefixCache(budget))
    plain = replace(evaluator, sampling=Sampling(solver), prefix_cache=None)
    candidate, saved = random_candidate(rng, space, 0.0), 0
    for _ in range(40):
        score = cached.score(candidate, [48])
        assert score.value == plain.score(candidate, [48]).value
        assert cached.prefix_cache is not None
        assert cached.prefix_cache.nbytes <= budget
        saved += score.saved
        candidate = mutate_local(rng, space, candidate, 0.0)
    assert saved > 0


def test_held_out_banks_leave_the_prefix_cache_alone(evaluator: Evaluator) -> None:
    cache = PrefixCache(2**20)
    replace(evaluator, prefix_cache=cache).score(CANDIDATE, [32], bank=1)
    assert len(cache) == 0


def test_the_kernel_distance_needs_features(evaluator: Evaluator) -> None:
    kid = replace(evaluator, metric="kid")
    good, bad = (kid.score(Candidate(t), [128]).value for t in ((900, 500, 100), (999, 998, 997)))
    assert good < bad
    with pytest.raises(StatisticsError, match="needs the reference's features"):
        replace(kid, reference=replace(kid.reference, features=None))
