"""What a study has left to do, and how long one batch of it takes here."""

from __future__ import annotations

from dataclasses import asdict

import optuna
import torch

from autodiffusion_optuna.evaluation.timing import time_batch
from autodiffusion_optuna.results.cost import Pace, Work
from autodiffusion_optuna.storage.attrs import COST_AHEAD
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.study.components import StudyComponents
from autodiffusion_optuna.study.starts import plan_starts, screen_costs
from autodiffusion_optuna.study.validation import most_to_validate


def work_left(components: StudyComponents, finished: int, *, begun: bool = True) -> Work:
    """What is left of a study with so many ``finished`` candidates, at most; ``begun``: whether it has its starts."""
    space, score = components.space, components.config.score
    plan = None if begun else plan_starts(components)
    evaluations = max(len(space.visits(space.max_steps, settings)) for settings in space.variants)
    return Work(
        evaluations=evaluations,
        paid=evaluations if space.max_cost is None else min(evaluations, space.max_cost),
        images=score.images,
        candidates=max(components.config.search.trials - finished, 0),
        held_out=most_to_validate(components),
        held_out_images=score.held_out_images,
        held_out_banks=score.held_out_banks,
        floor=_floor_evaluations(components),
        finished=finished,
        finalists=components.config.finalists,
        validation_images=components.config.validation_images,
        starts=sum(plan.costs.values()) if plan else 0,
        screen=sum(screen_costs(components).values()),
    )


def _floor_evaluations(components: StudyComponents) -> int:
    """Evaluations of the floor of many steps for an image, at most; 0 where it has no more steps than a candidate."""
    space, steps = components.space, min(components.config.score.floor_steps, components.space.T)
    if steps <= space.min_steps:
        return 0
    return max(len(space.visits(steps, settings)) for settings in space.variants)


def measure_pace(components: StudyComponents) -> Pace:
    """Time one batch, at the guidance that costs most; no value and no random state changes by it."""
    evaluator, space = components.evaluator, components.space
    scales = [*space.choices.get("guidance", ()), *space.ranges.get("guidance", ())]
    scale = max(float(value) for value in scales) if scales else evaluator.sampling.guidance
    device = components.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return Pace(*time_batch(evaluator, components.config.score.images, scale), device=name)


def note_cost(components: StudyComponents, study: optuna.Study) -> None:
    """Keep with the study what it will cost, for whoever launched this worker to say."""
    work = work_left(components, count_finished(study))
    if work.candidates:
        device = components.model.device
        parallel = parallel_workers(work.candidates, device)
        pace = measure_pace(components)
        study.set_user_attr(COST_AHEAD, {"work": asdict(work), "pace": asdict(pace), "parallel": parallel})


def parallel_workers(workers: int, device: torch.device) -> int:
    """How many times as fast ``workers`` workers of this host are than one, at best: those on one GPU share it."""
    return workers if device.type != "cuda" else min(workers, torch.cuda.device_count())
