from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.frechet import frechet_distance
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.evaluation.prefix import PrefixMemory
from autodiffusion_optuna.search.operators import mutate_local, random_candidate
from autodiffusion_optuna.search.space import SearchSpace

CANDIDATE = Candidate((900, 500, 100))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    model = load_model("mixture", clip=True)
    extractor = load_extractor("pixels", model.device)
    assert model.reference is not None
    return Evaluator(model, "ddim", "one", extractor, model.reference(extractor), batch=32)


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


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "plms"])
def test_scores_are_bit_equal_with_and_without_the_memory(evaluator: Evaluator, solver: str) -> None:
    """A search-like walk: one-gene changes of good candidates, several lengths, a memory that has to forget."""
    space = SearchSpace(T=1000, min_steps=2, max_steps=5)
    rng = np.random.default_rng(0)
    budget = 40 * 32 * 16 * 4  # forty of the batches' tensors
    remembering = replace(evaluator, solver=solver, memory=PrefixMemory(budget))
    plain = replace(evaluator, solver=solver, memory=None)
    candidate, saved = random_candidate(rng, space, 0.0), 0
    for _ in range(40):
        score = remembering.score(candidate, [48])
        assert score.value == plain.score(candidate, [48]).value
        assert remembering.memory is not None
        assert remembering.memory.nbytes <= budget
        saved += score.saved
        candidate = mutate_local(rng, space, candidate, 0.0)
    assert saved > 0


def test_fresh_banks_leave_the_memory_alone(evaluator: Evaluator) -> None:
    memory = PrefixMemory(2**20)
    replace(evaluator, memory=memory).score(CANDIDATE, [32], bank=1)
    assert len(memory) == 0


def test_the_kernel_distance_needs_features(evaluator: Evaluator) -> None:
    kid = replace(evaluator, metric="kid")
    good, bad = (kid.score(Candidate(t), [128]).value for t in ((900, 500, 100), (999, 998, 997)))
    assert good < bad
    with pytest.raises(StatisticsError, match="needs the reference's features"):
        replace(kid, reference=replace(kid.reference, features=None)).score(CANDIDATE, [32])
