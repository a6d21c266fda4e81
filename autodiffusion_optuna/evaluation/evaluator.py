"""Evaluator: Candidate -> Score. Images are sampled, quantised, embedded and compared without touching the disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import SEARCH_BANK
from autodiffusion_optuna.errors import ModelError, StatisticsError
from autodiffusion_optuna.evaluation.features import Extractor
from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance, mmd2_unbiased
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, PrefixCache, cached_denoise
from autodiffusion_optuna.evaluation.references.reference import Reference, log_trace_ratio
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.evaluation.solvers import evaluations, times

KEPT_NOISE = 2**28
"""Bytes of noise that are kept on the device; drawing the rest again costs less than one network evaluation."""

OnRung = Callable[[int, float], bool]
"""(images, value) -> whether to go on to the next rung."""


@dataclass
class Seconds:
    """Wall seconds by phase."""

    network: float = 0.0
    features: float = 0.0
    distance: float = 0.0


@dataclass(frozen=True)
class Score:
    """What one evaluation of a candidate gave.

    ``value``: distance at the last rung reached (lower is better), scored on ``images`` images.
    ``rungs``: (images, value) of every rung reached. ``complete``: False where a rung stopped it.
    ``run`` and ``saved``: network evaluations made, and spared by the prefix cache, counted per image.
    ``trace_ratio``: log of the total variance of the features over the reference's; well below 0, the images have
    less variety than they should, which a distance over few images may not show. None where nothing varies.
    """

    value: float
    images: int
    rungs: tuple[tuple[int, float], ...]
    complete: bool
    run: int
    saved: int
    seconds: Seconds
    trace_ratio: float | None = None
    preview: Tensor | None = None
    """The first images that were scored, uint8 [n, C, H, W] on the CPU, where they were asked for."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the value, as stored with a trial."""
        return {
            "rungs": [list(rung) for rung in self.rungs],
            "run": self.run,
            "saved": self.saved,
            "trace_ratio": self.trace_ratio,
            **{f"seconds_{phase}": round(value, 4) for phase, value in vars(self.seconds).items()},
        }


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Scores candidates for one model, solver, extractor and reference.

    Every candidate is scored on the same images-to-be: noise of image i comes from (seed, bank, i) alone, so
    differences between candidates are not blurred by the draw. ``batch`` images share a network evaluation; where
    the device runs out of memory, fewer do from then on, which changes no noise, label or prompt.
    ``sampling``: what the candidates do not choose. StatisticsError where the reference lacks what the metric needs.
    """

    model: Model
    sampling: Sampling
    extractor: Extractor
    reference: Reference
    metric: Literal["frechet", "kid"] = "frechet"
    seed: int = 0
    batch: int = 64
    prefix_cache: PrefixCache | None = None
    _noise: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _fits: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.metric == "kid" and self.reference.features is None:
            raise StatisticsError(
                "metric 'kid' needs the reference's features, and this reference holds moments only; "
                "give images as score.reference, or use metric = 'frechet'"
            )

    @property
    def fitting_batch(self) -> int:
        """Images that share a network evaluation now: ``batch``, or fewer once the device ran out of memory."""
        return self._fits[-1] if self._fits else self.batch

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise that are kept on the device."""
        return sum(noise.nbytes for noise in self._noise.values())

    def score(
        self,
        candidate: Candidate,
        rungs: Sequence[int],
        bank: int = SEARCH_BANK,
        on_rung: OnRung | None = None,
        preview: int = 0,
    ) -> Score:
        """Distance to the reference at each of ``rungs``, increasing counts of images of which one extends the other.

        ``on_rung`` may end the evaluation by returning False. ``preview``: how many of the first images the score
        keeps. StatisticsError where images or features are not finite.
        """
        self.prepare(0, rungs[-1], bank)
        seconds, counter = Seconds(), NfeCounter()
        moments, kept, reached, shown = Moments(self.extractor.dim), [], [], []
        start = 0
        for count in rungs:
            for images in self._batches(candidate, start, count, bank, seconds, counter):
                if moments.n < preview:
                    shown.append(images[: preview - moments.n].cpu())
                with _timed(seconds, "features", self.model.device):
                    features = self._extract(images)
                    moments.add(features)
                    kept.append(features)
                    # Below D images the features' own N x N Gram matrix is the cheaper way to the distance.
                    if self.metric == "frechet" and moments.n >= len(self.reference.mu):
                        kept.clear()
            with _timed(seconds, "distance", self.model.device):
                value = self._distance(moments, kept)
            reached.append((count, value))
            start = count
            if on_rung is not None and not on_rung(count, value):
                break
        ratio = log_trace_ratio(moments, self.reference)
        return Score(
            value,
            count,
            tuple(reached),
            complete=count == rungs[-1],
            run=counter.run,
            saved=counter.saved,
            seconds=seconds,
            trace_ratio=round(ratio, 6) if math.isfinite(ratio) else None,  # JSON has no infinity
            preview=torch.cat(shown) if shown else None,
        )

    def sample(self, candidate: Candidate, start: int, stop: int, bank: int = SEARCH_BANK) -> Tensor:
        """Images ``start`` to ``stop`` of a bank, uint8 [stop - start, C, H, W]."""
        self.prepare(start, stop, bank)
        return torch.cat(list(self._batches(candidate, start, stop, bank, Seconds(), NfeCounter())))

    def prepare(self, start: int, stop: int, bank: int = SEARCH_BANK) -> None:
        """Encode the prompts of images ``start`` to ``stop`` - 1 of a bank, those that are not yet."""
        conditions = self.model.conditions
        if conditions is not None and conditions.prepare is not None:
            conditions.prepare(self._bank(bank).conditions(start, stop, conditions.count, conditions.draw))

    def _batches(
        self, candidate: Candidate, start: int, stop: int, bank: int, seconds: Seconds, counter: NfeCounter
    ) -> Iterator[Tensor]:
        first = start
        while first < stop:
            last = min(first + self.fitting_batch, stop)
            try:
                with _timed(seconds, "network", self.model.device):
                    images = self._draw(candidate, first, last, bank, counter)
            except torch.OutOfMemoryError:
                self._shrink(last - first)
                continue
            yield images
            first = last

    def _draw(self, candidate: Candidate, first: int, last: int, bank: int, counter: NfeCounter) -> Tensor:
        """Images ``first`` to ``last`` - 1 of a bank in one batch."""
        sampling = self.sampling.of(candidate)
        nodes = times(self.model.schedule, candidate.timesteps, sampling.final)
        images = self._bank(bank)
        solve = sampling.find_solver(lambda step: images.step_noise(first, last, step).to(self.model.device))
        conditions = self.model.conditions
        chosen = images.conditions(first, last, conditions.count, conditions.draw) if conditions else []
        denoise = cached_denoise(
            self.model.bind(chosen, sampling.guidance),
            candidate,
            self.prefix_cache if bank == SEARCH_BANK else None,
            # All that decides an x0 besides the queries before it; a solver may treat its last steps
            # differently, so candidates of different lengths share nothing.
            (sampling, candidate.steps, self.seed, bank, first, last),
            counter,
            evaluations(sampling.solver, candidate.steps, sampling.final),
        )
        return self.model.to_images(solve(denoise, self._bank_noise(bank, first, last), nodes))

    def _bank(self, bank: int) -> Bank:
        return Bank(self.seed, bank, self.model.shape)

    def _shrink(self, failed: int) -> None:
        """Go on with half of a batch that did not fit; ``ModelError`` where it was a single image."""
        self._make_room()
        if failed == 1:
            raise _too_small()
        self._fits.append(failed // 2)

    def _make_room(self) -> None:
        """Free what is kept for speed alone; it may be what filled the device."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        self._noise.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _extract(self, images: Tensor) -> Tensor:
        """Features float32 [B, D] of uint8 [B, C, H, W]; of half a batch at a time where the extractor needs it."""
        try:
            return self.extractor(images)
        except torch.OutOfMemoryError:
            self._make_room()
            if len(images) == 1:
                raise _too_small() from None
        return torch.cat([self._extract(half) for half in images.chunk(2)])

    def _bank_noise(self, bank: int, first: int, last: int) -> Tensor:
        key = (self.seed, bank, first, last)
        if key in self._noise:
            return self._noise[key]
        noise = self._bank(bank).noise(first, last).to(self.model.device)
        # Held-out banks are used a few times at the end, and not worth keeping.
        if bank == SEARCH_BANK and self.noise_bytes + noise.nbytes <= KEPT_NOISE:
            self._noise[key] = noise
        return noise

    def _distance(self, moments: Moments, kept: list[Tensor]) -> float:
        if self.metric == "frechet":
            return frechet_distance(torch.cat(kept) if kept else moments, self.reference)
        assert self.reference.features is not None
        return mmd2_unbiased(torch.cat(kept), self.reference.features)


CPU_BATCH, LARGEST_BATCH = 64, 1024
SHARE_OF_MEMORY = 0.6  # the rest is for the extractor, the decoder and the prefix cache


def largest_batch(model: Model) -> int:
    """Images in a batch that fits the model's device: a power of two, measured with one and with two images.

    On the CPU, where more than fits the caches is no faster, 64. ``ModelError`` where not even one image fits.
    """
    if model.device.type != "cuda":
        return CPU_BATCH
    one, two = (_peak_bytes(model, images) for images in (1, 2))
    if one is None:
        raise _too_small()
    if two is None:
        return 1
    free, _ = torch.cuda.mem_get_info(model.device)
    return batch_for(free, one, max(two - one, 1))


def batch_for(free: int, first: int, each: int) -> int:
    """Largest power of two of images that fit in a share of ``free`` bytes: one takes ``first``, others ``each``."""
    room = int(SHARE_OF_MEMORY * free) - first
    fitting = min(max(1 + room // each, 1), LARGEST_BATCH)
    return int(2 ** (fitting.bit_length() - 1))


def _too_small() -> ModelError:
    return ModelError(
        "the device ran out of memory with a single image; lower model.prefix_cache_mb, or use "
        "model.precision = 'bfloat16'"
    )


def _peak_bytes(model: Model, images: int) -> int | None:
    """Bytes that one evaluation takes on a GPU at its peak, beyond what was there before; None where it has fewer."""
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    x = torch.zeros(images, *model.shape, device=model.device)
    try:
        model.to_images(model.bind([0] * images)(x, model.schedule.T // 2, 0))
    except torch.OutOfMemoryError:
        return None
    return int(torch.cuda.max_memory_allocated(model.device) - before)


@contextmanager
def _timed(seconds: Seconds, phase: str, device: torch.device) -> Iterator[None]:
    """Adds the wall seconds of a block to one phase; on a GPU it waits for the work of the block."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        setattr(seconds, phase, getattr(seconds, phase) + time.perf_counter() - started)
