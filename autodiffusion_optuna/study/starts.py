"""Starts that are computed from the model itself: once, when a study is begun, for all of its workers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from autodiffusion_optuna.candidate import Candidate, Value
from autodiffusion_optuna.evaluation.drawing import ImageSampler
from autodiffusion_optuna.evaluation.optimal_steps import count_evaluations, gits, optimal_steps
from autodiffusion_optuna.evaluation.teacher import POINTS, run_teacher
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.headline import UNIFORM
from autodiffusion_optuna.search.repair import Timesteps, spread
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.timesteps import log_snr
from autodiffusion_optuna.storage.attrs import SCREEN_TEACHER

if TYPE_CHECKING:
    from autodiffusion_optuna.study.components import ImageComponents, StudyComponents

C = TypeVar("C", "StudyComponents", "ImageComponents")

_log = logging.getLogger("autodiffusion_optuna")

OSS, GITS, TEACHER = "oss", "gits", "teacher"

IMAGES = 8
"""Images of a teacher: the lists of 16 and of 32 are no better (benchmarks/starts.py)."""
NUMBERS = 2**28
"""Numbers in the states of a teacher; of large images it has fewer, one at least."""
WIDEST = 0.65
"""Widest step of the screen's teacher on average, in log(alpha / sigma)."""


@dataclass(frozen=True)
class Starts:
    """Computed baselines by name, and what they cost: network evaluations, counted by image, by name; and seconds."""

    candidates: dict[str, Candidate]
    costs: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class StartPlan:
    """What is to be computed before a study begins.

    ``settings``: searched settings of each baseline by its name. ``steps``: of each, the length of its list.
    ``points``, ``images``: of the teacher. ``candidate``: network evaluations of one candidate of the study, at most.
    """

    settings: dict[str, dict[str, Value]]
    steps: dict[str, int]
    points: int
    images: int
    candidate: int

    @property
    def costs(self) -> dict[str, int]:
        """Network evaluations, counted by image, of the teacher and of each kind of list."""
        found = {TEACHER: self.points * self.images}
        lengths = self.lengths(OSS)
        if lengths:
            found[OSS] = self.images * count_evaluations(self.points, min(lengths), max(lengths))
        return found | ({GITS: 0} if self.lengths(GITS) else {})

    def lengths(self, kind: str) -> set[int]:
        """Lengths of the lists of one kind."""
        return {steps for name, steps in self.steps.items() if name.partition(",")[0] == kind}

    def line(self, screen: int = 0) -> str:
        """What is computed and what it costs, as one line; ``screen``: evaluations of the screen's teacher."""
        total = sum(self.costs.values())
        kinds = " and ".join(kind for kind in (OSS, GITS) if self.lengths(kind))
        return (
            f"computing where the search starts ({kinds}), from {self.images} images of {self.points} steps: "
            f"{total:,} network evaluations, as many as {total / self.candidate:.1f} candidates have"
            + (f"; then {screen:,} for the screen's teacher" if screen else "")
        )


def computed_names(space: SearchSpace) -> dict[str, dict[str, Value]]:
    """Baselines that are computed, by name: with the first of each searched setting, and "oss" with each other."""
    default = space.default_settings
    others = {
        f"{OSS}, {setting} {value}": {**default, setting: value}
        for setting, values in space.choices.items()
        for value in values[1:]
    }
    return {OSS: default, **others, GITS: default}


def start_order(space: SearchSpace, closed_forms: Iterable[str]) -> tuple[str, ...]:
    """Names of all baselines in the order in which a search tries them.

    The first few are scored in full, for the race has nothing yet to stop them by: what mostly is the best, what every
    result is compared with, and what is better than the first for some models. ``closed_forms`` come last: unless they
    were asked for, there are children between them.
    """
    best, *others, second = computed_names(space)
    return tuple(dict.fromkeys((best, UNIFORM, second, *others, *closed_forms)))


def plan_starts(components: StudyComponents) -> StartPlan | None:
    """What of ``search.warm_starts`` is to be computed; None where nothing is."""
    space, wanted = components.space, set(components.warm_starts)
    settings = {name: given for name, given in computed_names(space).items() if name in wanted}
    if not settings:
        return None
    steps = {name: space.full_steps_with(given) for name, given in settings.items()}
    points = min(max(POINTS, 2 * max(steps.values())), space.T)
    channels, height, width = components.model.shape
    room = max(NUMBERS // (points * channels * height * width), 1)
    images = components.config.score.images
    candidate = images * max(space.most_evaluations(given) for given in space.variants)
    return StartPlan(settings, steps, points, min(IMAGES, images, room), candidate)


def screen_timesteps(space: SearchSpace, schedule: NoiseSchedule) -> Timesteps:
    """Of the teacher that the screen compares with: twice the most network evaluations of a candidate, or more.

    Even in log(alpha / sigma), about ``WIDEST`` apart where they are fewer: at so many steps of its solver they rank
    more steadily than other closed forms, for variance-preserving schedules and flows alike (``benchmarks/race.py``).
    """
    most = max(space.most_evaluations(settings) for settings in space.variants)
    levels = schedule.lambdas[np.isfinite(schedule.lambdas)]
    return log_snr(schedule, min(max(2 * most, 1 + math.ceil(float(np.ptp(levels)) / WIDEST)), space.T))


def screen_costs(components: StudyComponents) -> dict[str, int]:
    """Network evaluations, counted by image, of the teacher that the screen compares with; empty without a screen.

    Every worker runs it when it starts; each counts.
    """
    evaluator = components.evaluator
    return (
        {SCREEN_TEACHER: len(evaluator.screen_timesteps) * evaluator.screen_images} if evaluator.screen_images else {}
    )


def compute_starts(components: StudyComponents, plan: StartPlan) -> Starts:
    """Run the teacher and compute the lists; none where the model's images are not finite, with a warning."""
    space, sampler, started = components.space, _sampler(components), time.perf_counter()
    teacher = run_teacher(sampler, plan.images, plan.points)
    costs, lists = {TEACHER: teacher.evaluations}, dict[str, dict[int, tuple[int, ...]]]()
    if not teacher.end.isfinite().all():
        _log.warning(
            "a run of %d steps gives images that are not finite; the search starts without what is computed from it",
            plan.points,
        )
        return Starts({}, costs, time.perf_counter() - started)
    for kind in (OSS, GITS):
        lengths = plan.lengths(kind)
        if lengths and kind == OSS:
            found = optimal_steps(sampler, teacher, min(lengths), max(lengths))
            lists[kind], costs[kind] = found.lists, found.evaluations
        elif lengths:
            lists[kind], costs[kind] = gits(sampler, teacher, min(lengths), max(lengths)), 0
    candidates = {}
    for name, settings in plan.settings.items():
        timesteps = lists[name.partition(",")[0]][plan.steps[name]]
        apart = spread(timesteps, space.T, space.min_gap)
        candidate = Candidate(apart, settings=tuple(sorted(settings.items())))
        candidates[name] = space.fit(candidate, space.max_skip)
    return Starts(candidates, costs, time.perf_counter() - started)


def _sampler(components: StudyComponents) -> ImageSampler:
    """What draws images with the default of each searched setting."""
    images, settings = components.images, tuple(components.space.default_settings.items())
    return replace(images, sampling=images.sampling.of(Candidate((0,), settings=settings))) if settings else images


def with_baselines(components: C, keys: Mapping[str, str]) -> C:
    """Components whose baselines are those that a study was begun with; ``keys``: candidate keys by name.

    Those that a study has besides, for tables alone, are no part of it.
    """
    names = [*computed_names(components.space), *components.baselines]
    stored = {name: Candidate.from_key(key) for name, key in keys.items() if name in names}
    return replace(
        components, baselines={**stored, **{n: c for n, c in components.baselines.items() if n not in stored}}
    )


Say = Callable[[str], None]
"""Prints a line."""
