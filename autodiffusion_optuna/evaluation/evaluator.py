"""Evaluator: Candidate -> Score. Images are sampled, quantised, embedded and compared without touching the disk."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import SEARCH_BANK
from autodiffusion_optuna.errors import ConfigError, StatisticsError
from autodiffusion_optuna.evaluation.drawing import ImageSampler, Seconds, timed, too_small
from autodiffusion_optuna.evaluation.features import Extractor
from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance, mmd2_unbiased
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, PrefixCache
from autodiffusion_optuna.evaluation.references.reference import Reference, log_trace_ratio
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.screen import Screen
from autodiffusion_optuna.evaluation.teacher import teacher_images

_log = logging.getLogger("autodiffusion_optuna")

OnRung = Callable[[int, float], bool]
"""(images, value) -> whether to go on to the next rung."""

OnScreen = Callable[[Sequence[float]], bool]
"""Distances to the teacher by image -> whether to go on to the first rung."""


@dataclass(frozen=True)
class Score:
    """What one evaluation of a candidate gave.

    ``value``: distance at the last rung reached (lower is better), scored on ``images`` images; where the screen
    stopped it, that of the screen. ``rungs``: (images, value) of every rung reached. ``screen``: distance to the
    teacher by image, see ``Screen``; empty without one. ``complete``: False where the screen or a rung stopped it.
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
    screen: tuple[float, ...] = ()
    preview: Tensor | None = None
    """The first images that were scored, uint8 [n, C, H, W] on the CPU, where they were asked for."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the value and what the screen said of each image, as stored with a trial."""
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

    Their images are drawn as ``ImageSampler`` says, whose settings it takes. StatisticsError where the reference lacks
    what the metric needs.
    """

    model: Model
    sampling: Sampling
    extractor: Extractor
    reference: Reference
    metric: Literal["frechet", "kid"] = "frechet"
    seed: int = 0
    batch: int = 64
    prefix_cache: PrefixCache | None = None
    screen_images: int = 0
    """Images of the search's bank that the screen compares; 0: no screen."""
    screen_timesteps: tuple[int, ...] = ()
    """Of the fine run that it compares them with, see ``starts.screen_timesteps``; descending."""

    def __post_init__(self) -> None:
        if self.screen_images and not self.screen_timesteps:
            raise ConfigError(
                f"screen_images = {self.screen_images} needs screen_timesteps, those of the fine run; got none"
            )
        if self.metric == "kid" and self.reference.features is None:
            raise StatisticsError(
                "metric 'kid' needs the reference's features, and this reference holds moments only; "
                "give images as score.reference, or use metric = 'frechet'"
            )

    @cached_property
    def images(self) -> ImageSampler:
        """What draws the images that are scored."""
        return ImageSampler(self.model, self.sampling, self.seed, self.batch, self.prefix_cache)

    @cached_property
    def screen(self) -> Screen | None:
        """What compares candidates with a fine run of the model, which is made when it is first asked for.

        None where there is to be none, and with a warning where that run's images are not finite.
        """
        if not self.screen_images:
            return None
        teacher = teacher_images(self.images, self.screen_images, self.screen_timesteps)
        if teacher is None:
            _log.warning(
                "a run of %d steps gives images that are not finite; the search goes without the screen that compares "
                "candidates with it",
                len(self.screen_timesteps),
            )
            return None
        features = torch.cat([self.extract(images) for images in torch.split(teacher, self.fitting_batch)])
        return Screen.of(features, self.reference)

    @property
    def fitting_batch(self) -> int:
        """Images that share a network evaluation now: ``batch``, or fewer once the device ran out of memory."""
        return self.images.fitting_batch

    def score(
        self,
        candidate: Candidate,
        rungs: Sequence[int],
        bank: int = SEARCH_BANK,
        on_rung: OnRung | None = None,
        preview: int = 0,
        cached: bool | None = None,
        screen: Screen | None = None,
        on_screen: OnScreen | None = None,
    ) -> Score:
        """Distance to the reference at each of ``rungs``, increasing counts of images of which one extends the other.

        ``on_rung`` may end the evaluation by returning False. ``preview``: how many of the first images the score
        keeps. ``cached``: whether candidates with the same first steps share them; None: on the search's bank alone.
        ``screen``: compares the first images, fewer than those of the first rung, with its teacher's before that;
        ``on_screen`` may end the evaluation then. StatisticsError where images or features are not finite.
        """
        cache = self.prefix_cache if (bank == SEARCH_BANK if cached is None else cached) else None
        self.prepare(0, rungs[-1], bank)
        seconds, counter = Seconds(), NfeCounter()
        gathered = _Gathered(self, screen, preview)
        reached: list[tuple[int, float]] = []
        start, first = 0, [] if screen is None else [screen.count]
        for count in [*first, *rungs]:
            for images in self.images.batches(candidate, start, count, bank, seconds, counter, cache):
                with timed(seconds, "features", self.model.device):
                    gathered.add(images)
            start = count
            if count in first:
                value = statistics.fmean(gathered.screened)
                go_on = on_screen is None or on_screen(gathered.screened)
            else:
                with timed(seconds, "distance", self.model.device):
                    value = gathered.distance()
                reached.append((count, value))
                go_on = on_rung is None or on_rung(count, value)
            if not go_on:
                break
        ratio = log_trace_ratio(gathered.moments, self.reference)
        return Score(
            value,
            count,
            tuple(reached),
            complete=count == rungs[-1],
            run=counter.run,
            saved=counter.saved,
            seconds=seconds,
            trace_ratio=round(ratio, 6) if math.isfinite(ratio) else None,  # JSON has no infinity
            screen=tuple(gathered.screened),
            preview=torch.cat(gathered.shown) if gathered.shown else None,
        )

    def sample(self, candidate: Candidate, start: int, stop: int, bank: int = SEARCH_BANK) -> Tensor:
        """Images ``start`` to ``stop`` of a bank, uint8 [stop - start, C, H, W]."""
        return self.images.sample(candidate, start, stop, bank)

    def prepare(self, start: int, stop: int, bank: int = SEARCH_BANK) -> None:
        """Encode the prompts of images ``start`` to ``stop`` - 1 of a bank, those that are not yet."""
        self.images.prepare(start, stop, bank)

    def extract(self, images: Tensor) -> Tensor:
        """Features float32 [B, D] of uint8 [B, C, H, W]; of half a batch at a time where the extractor needs it."""
        try:
            return self.extractor(images)
        except torch.OutOfMemoryError:
            self.images.make_room()
            if len(images) == 1:
                raise too_small(self.model.name) from None
        return torch.cat([self.extract(half) for half in images.chunk(2)])


class _Gathered:
    """What a candidate's images have given so far: moments and features, distances to the teacher, the first images."""

    def __init__(self, evaluator: Evaluator, screen: Screen | None, preview: int) -> None:
        self.evaluator, self.screen, self.preview = evaluator, screen, preview
        self.moments = Moments(evaluator.extractor.dim)
        self.features: list[Tensor] = []
        self.screened: list[float] = []
        self.shown: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Take in the next images, uint8 [B, C, H, W]."""
        seen = self.moments.n
        if seen < self.preview:
            self.shown.append(images[: self.preview - seen].cpu())
        features = self.evaluator.extract(images)
        if self.screen is not None and seen < self.screen.count:
            self.screened += self.screen.distances(features, seen)
        self.moments.add(features)
        self.features.append(features)
        # Below D images the features' own N x N Gram matrix is the cheaper way to the distance.
        if self.evaluator.metric == "frechet" and self.moments.n >= len(self.evaluator.reference.mu):
            self.features.clear()

    def distance(self) -> float:
        """Of the images so far to the reference."""
        reference = self.evaluator.reference
        if self.evaluator.metric == "frechet":
            return frechet_distance(torch.cat(self.features) if self.features else self.moments, reference)
        assert reference.features is not None
        return mmd2_unbiased(torch.cat(self.features), reference.features)


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
        raise too_small(model.name)
    if two is None:
        return 1
    free, _ = torch.cuda.mem_get_info(model.device)
    return batch_for(free, one, max(two - one, 1))


def batch_for(free: int, first: int, each: int) -> int:
    """Largest power of two of images that fit in a share of ``free`` bytes: one takes ``first``, others ``each``."""
    room = int(SHARE_OF_MEMORY * free) - first
    fitting = min(max(1 + room // each, 1), LARGEST_BATCH)
    return int(2 ** (fitting.bit_length() - 1))


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
