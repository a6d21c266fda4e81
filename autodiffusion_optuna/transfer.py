"""Use an exported schedule without its study: score it, on its own model or another, and draw samples with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import StudyConfig, parse_config
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.records import Fresh
from autodiffusion_optuna.schedule import Schedule
from autodiffusion_optuna.search.schedules import KNOWN
from autodiffusion_optuna.study import Parts, build


@dataclass(frozen=True, eq=False)
class Opened:
    """A schedule on a model: the parts that score it, and what is compared.

    ``rivals``: uniform with as many steps, then the schedule itself, both with the schedule's solver.
    """

    parts: Parts
    rivals: dict[str, Candidate]


def open_schedule(schedule: Schedule, overrides: Iterable[str] = (), *, trust: bool = False) -> Opened:
    """Load the model and the score of a schedule; ``overrides`` are ``key=value`` settings, as of a study file.

    ``ConfigError`` where the schedule does not fit the model, or is of a version that did not keep its settings.
    """
    parts = build(schedule_config(schedule, overrides), trust=trust)
    found = schedule.candidate(parts.model.units, parts.model.schedule.T)
    uniform = Candidate(KNOWN["uniform"](parts.model.schedule, found.steps))
    return Opened(parts, {"uniform": uniform, schedule.study: found})


def schedule_config(schedule: Schedule, overrides: Iterable[str] = ()) -> StudyConfig:
    """A study of one candidate that makes and scores images as the schedule says."""
    if schedule.config is None:
        raise ConfigError(
            f"the schedule of study {schedule.study!r} is of an older version and does not say how its images were "
            f"made; go on with adopt run --study {schedule.study} and export it again"
        )
    sampling: dict[str, Any] = {
        "solver": schedule.solver,
        "steps": len(schedule.timesteps),
        "final": schedule.final,
        "guidance": schedule.guidance,
        "eta": schedule.eta,
        "amplification_cap": schedule.amplification_cap,
    }
    table = {
        "name": schedule.study,
        "model": schedule.config.model.model_dump(mode="json"),
        "sampling": {key: value for key, value in sampling.items() if value is not None},
        "search": {"trials": 1, "warm_starts": ["uniform"]},
        "score": schedule.config.score.model_dump(mode="json"),
    }
    return parse_config(table, overrides)


def score_rivals(opened: Opened) -> dict[str, Fresh]:
    """Values of uniform and of the schedule on the config's fresh banks."""
    score, evaluator = opened.parts.config.score, opened.parts.evaluator
    banks = range(1, score.fresh_banks + 1)
    return {
        name: Fresh(
            score.fresh_images,
            tuple(evaluator.score(candidate, [score.fresh_images], bank=bank).value for bank in banks),
        )
        for name, candidate in opened.rivals.items()
    }


def sample_rivals(opened: Opened, images: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """Labelled samples from the same fresh noises, uint8 [images, C, H, W] each: uniform, then the schedule."""
    return [
        (f"{name}, {candidate.steps} steps", opened.parts.evaluator.sample(candidate, 0, images, bank=1).cpu().numpy())
        for name, candidate in opened.rivals.items()
    ]
