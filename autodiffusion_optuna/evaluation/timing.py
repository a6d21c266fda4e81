"""How long one batch takes. Nothing that decides a value is touched: no cache, no shared randomness, no setting."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance, mmd2_unbiased
from autodiffusion_optuna.evaluation.seeds import Bank

T = TypeVar("T")


class BatchSeconds(NamedTuple):
    """Images in a batch, and seconds of one network evaluation, of decoding and embedding it, and of one distance."""

    batch: int
    evaluation: float
    rest: float
    distance: float


def time_batch(evaluator: Evaluator, images: int, scale: float | None = None) -> BatchSeconds:
    """Time one batch of a candidate of ``images`` images, after a first one that is not timed.

    ``scale``: guidance; None is the model's own. Half a batch is timed where a whole one does not fit. ``ModelError``
    where not even one image fits.
    """
    batch = min(evaluator.fitting_batch, images)
    with unchanged_randomness(evaluator.model.device):
        while True:
            try:
                return _timed_batch(evaluator, batch, images, scale)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise ModelError(
                        f"{evaluator.model.name}: the device ran out of memory with a single image; use a lower "
                        "model.precision or another device"
                    ) from None
                batch //= 2


def _timed_batch(evaluator: Evaluator, batch: int, images: int, scale: float | None) -> BatchSeconds:
    model, bank = evaluator.model, Bank(evaluator.seed, 0, evaluator.model.shape)
    x, t = bank.noise(0, batch).to(model.device), model.schedule.T // 2
    evaluator.prepare(0, batch)
    conditions = model.conditions
    chosen = bank.conditions(0, batch, conditions.count, conditions.draw) if conditions else []
    denoise = model.bind(chosen, scale)
    evaluation, x0 = _second(lambda: denoise(x, t, 0), model.device)
    rest, _ = _second(lambda: evaluator.extractor(model.to_images(x0)), model.device)
    return BatchSeconds(batch, evaluation, rest, _distance_seconds(evaluator, images))


def _distance_seconds(evaluator: Evaluator, images: int) -> float:
    """Of one distance, on features drawn at random, of which as many count as features have numbers."""
    reference, device = evaluator.reference, evaluator.model.device
    dim = len(reference.mu)
    count = images if evaluator.metric == "kid" else min(images, dim + 1)
    features = torch.randn(count, dim, generator=torch.Generator().manual_seed(0)).to(device)
    if evaluator.metric == "kid":
        kept = reference.features
        assert kept is not None
        return _second(lambda: mmd2_unbiased(features, kept), device)[0]
    generated = features if images < dim else Moments.of(features)
    return _second(lambda: frechet_distance(generated, reference), device)[0]


def _second(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds that ``run`` takes the second time, and what it gives."""
    run()
    _finish(device)
    started = time.perf_counter()
    result = run()
    _finish(device)
    return time.perf_counter() - started, result


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def unchanged_randomness(device: torch.device) -> Iterator[None]:
    """The global random states of Python, NumPy and PyTorch are what they were afterwards, whoever draws from them."""
    before, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one, which others use)
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)  # noqa: NPY002
