"""Images of candidates, drawn on the device from the noise of a bank; what needs no score needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import SEARCH_BANK
from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.denoiser import UnitDenoise
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, PrefixCache, cached_denoise
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.evaluation.solvers import evaluations, times

T = TypeVar("T")

KEPT_NOISE = 2**28
"""Bytes of noise that are kept on the device; drawing the rest again costs less than one network evaluation."""


@dataclass
class Seconds:
    """Wall seconds by phase."""

    network: float = 0.0
    features: float = 0.0
    distance: float = 0.0


@dataclass(frozen=True, eq=False)
class ImageSampler:
    """Draws the images of candidates for one model and solver.

    Every candidate gets the same images-to-be: noise of image i comes from (seed, bank, i) alone, so differences
    between candidates are not blurred by the draw. ``batch`` images share a network evaluation; where the device runs
    out of memory, fewer do from then on, which changes no noise, label or prompt.
    ``sampling``: what the candidates do not choose.
    """

    model: Model
    sampling: Sampling
    seed: int = 0
    batch: int = 64
    prefix_cache: PrefixCache | None = None
    _noise: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _fits: list[int] = field(default_factory=list, init=False, repr=False)

    @property
    def fitting_batch(self) -> int:
        """Images that share a network evaluation now: ``batch``, or fewer once the device ran out of memory."""
        return self._fits[-1] if self._fits else self.batch

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise that are kept on the device."""
        return sum(noise.nbytes for noise in self._noise.values())

    def sample(self, candidate: Candidate, start: int, stop: int, bank: int = SEARCH_BANK) -> Tensor:
        """Images ``start`` to ``stop`` of a bank, uint8 [stop - start, C, H, W]."""
        self.prepare(start, stop, bank)
        cache = self.prefix_cache if bank == SEARCH_BANK else None
        return torch.cat(list(self.batches(candidate, start, stop, bank, Seconds(), NfeCounter(), cache)))

    def prepare(self, start: int, stop: int, bank: int = SEARCH_BANK) -> None:
        """Encode the prompts of images ``start`` to ``stop`` - 1 of a bank, those that are not yet."""
        conditions = self.model.conditions
        if conditions is not None and conditions.prepare is not None:
            conditions.prepare(self._bank(bank).conditions(start, stop, conditions.count, conditions.draw))

    def batches(
        self,
        candidate: Candidate,
        start: int,
        stop: int,
        bank: int,
        seconds: Seconds,
        counter: NfeCounter,
        cache: PrefixCache | None,
    ) -> Iterator[Tensor]:
        """Images ``start`` to ``stop`` - 1, a batch at a time; seconds and network evaluations are added up."""

        def draw(first: int, last: int) -> Tensor:
            with timed(seconds, "network", self.model.device):
                return self._draw(candidate, first, last, bank, counter, cache)

        return self.by_batch(draw, start, stop)

    def by_batch(self, run: Callable[[int, int], T], start: int, stop: int) -> Iterator[T]:
        """``run(first, last)`` for images ``start`` to ``stop`` - 1, as many at a time as fit the device.

        Where memory runs out, ``run`` is called again with fewer; ``ModelError`` where it does with a single image.
        """
        first = start
        while first < stop:
            last = min(first + self.fitting_batch, stop)
            try:
                done = run(first, last)
            except torch.OutOfMemoryError:
                self._shrink(last - first)
                continue
            yield done
            first = last

    def denoiser(self, sampling: Sampling, first: int, last: int, bank: int = SEARCH_BANK) -> UnitDenoise:
        """What denoises images ``first`` to ``last`` - 1 of a bank: their labels or prompts, at a guidance scale."""
        conditions, images = self.model.conditions, self._bank(bank)
        chosen = images.conditions(first, last, conditions.count, conditions.draw) if conditions else []
        return self.model.bind(chosen, sampling.guidance)

    def noise(self, first: int, last: int, bank: int = SEARCH_BANK) -> Tensor:
        """Noise that images ``first`` to ``last`` - 1 of a bank start from, float32 [last - first, C, H, W]."""
        key = (self.seed, bank, first, last)
        if key in self._noise:
            return self._noise[key]
        noise = self._bank(bank).noise(first, last).to(self.model.device)
        # Held-out banks are used a few times at the end, and not worth keeping.
        if bank == SEARCH_BANK and self.noise_bytes + noise.nbytes <= KEPT_NOISE:
            self._noise[key] = noise
        return noise

    def _draw(
        self, candidate: Candidate, first: int, last: int, bank: int, counter: NfeCounter, cache: PrefixCache | None
    ) -> Tensor:
        """Images ``first`` to ``last`` - 1 of a bank in one batch."""
        sampling = self.sampling.of(candidate)
        nodes = times(self.model.schedule, candidate.timesteps, sampling.final)
        images = self._bank(bank)
        solve = sampling.find_solver(lambda step: images.step_noise(first, last, step).to(self.model.device))
        denoise = cached_denoise(
            self.denoiser(sampling, first, last, bank),
            candidate,
            cache,
            # All that decides an x0 besides the queries before it; a solver may treat its last steps
            # differently, so candidates of different lengths share nothing.
            (sampling, candidate.steps, self.seed, bank, first, last),
            counter,
            evaluations(sampling.solver, candidate.steps, sampling.final),
        )
        return self.model.to_images(solve(denoise, self.noise(first, last, bank), nodes))

    def _bank(self, bank: int) -> Bank:
        return Bank(self.seed, bank, self.model.shape)

    def _shrink(self, failed: int) -> None:
        """Go on with half of a batch that did not fit; ``ModelError`` where it was a single image."""
        self.make_room()
        if failed == 1:
            raise too_small(self.model.name)
        self._fits.append(failed // 2)

    def make_room(self) -> None:
        """Free what is kept for speed alone; it may be what filled the device."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        self._noise.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def too_small(name: str) -> ModelError:
    """The error of a model of that name of which not even one image fits the device."""
    return ModelError(
        f"{name}: the device ran out of memory with a single image; lower model.prefix_cache_mb, or use "
        "model.precision = 'bfloat16'"
    )


@contextmanager
def timed(seconds: Seconds, phase: str, device: torch.device) -> Iterator[None]:
    """Adds the wall seconds of a block to one phase; on a GPU it waits for the work of the block."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        setattr(seconds, phase, getattr(seconds, phase) + time.perf_counter() - started)
