"""One batch is timed without changing a value, a random state or what is kept."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.evaluation.prefix_cache import PrefixCache
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.timing import time_batch, unchanged_randomness

CANDIDATES = [Candidate((900, 500, 100)), Candidate((900, 400, 50))]


def make(device: str = "cpu", source: str = "mixture", metric: str = "frechet") -> Evaluator:
    model = load_model(ModelConfig(source=source, device=device))
    extractor = load_extractor("pixels" if source == "mixture" else source, model.device)
    assert model.reference is not None
    reference = model.reference(extractor)
    cache = PrefixCache(2**20)
    return Evaluator(model, Sampling(), extractor, reference, metric, batch=16, prefix_cache=cache)  # type: ignore[arg-type]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", ["mixture", "digits"])
def test_values_and_random_states_are_the_same_to_the_bit(device: str, source: str) -> None:
    plain, timed = make(device, source), make(device, source)
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    measured = time_batch(timed, 40)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert states[:2] == after[:2]
    assert torch.equal(states[2], after[2])
    assert measured.batch == 16
    assert min(measured[1:]) > 0
    assert timed.prefix_cache is not None
    assert len(timed.prefix_cache) == timed.images.noise_bytes == 0
    for candidate in CANDIDATES:
        one, other = plain.score(candidate, [40]), timed.score(candidate, [40])
        assert one.value == other.value
        assert (one.run, one.saved) == (other.run, other.saved)


def test_whoever_draws_from_the_global_states_leaves_them_as_they_were() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with unchanged_randomness(torch.device("cpu")):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    assert torch.equal(before, torch.get_rng_state())


def test_fewer_images_than_a_batch_are_timed_as_they_are() -> None:
    assert time_batch(make(), 5).batch == 5


def test_kernel_distance() -> None:
    assert time_batch(make(metric="kid"), 20).distance > 0


def test_half_a_batch_where_a_whole_one_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make()
    fits = 6
    bind = type(evaluator.model).bind

    def limited(self: object, chosen: object, scale: float | None = None) -> object:
        denoise = bind(evaluator.model, chosen, scale)  # type: ignore[arg-type]

        def run(x: torch.Tensor, t: float, skip: int) -> torch.Tensor:
            if len(x) > fits:
                raise torch.OutOfMemoryError
            return denoise(x, t, skip)

        return run

    monkeypatch.setattr(type(evaluator.model), "bind", limited)
    assert time_batch(evaluator, 40).batch == 4
    assert evaluator.fitting_batch == 16  # which a score finds out by itself
    fits = 0
    with pytest.raises(ModelError, match="single image"):
        time_batch(evaluator, 40)
