"""Use an exported result without its study: score it, on its own model or another, and draw samples with it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import StudyConfig, parse_config
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.sanity import check_model
from autodiffusion_optuna.export.check import same_weights
from autodiffusion_optuna.export.result import Result
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.search.timesteps import BASELINES
from autodiffusion_optuna.study.components import ImageComponents, StudyComponents, build, build_images

C = TypeVar("C", StudyComponents, ImageComponents)


@dataclass(frozen=True, eq=False)
class Opened(Generic[C]):
    """A result on a model: the components that score it or draw its images, and what is compared.

    ``compared``: uniform with as many steps, then the result itself, both with the result's solver. ``other``: see
    ``other_model``.
    """

    components: C
    compared: dict[str, Candidate]
    other: str | None = None


def open_result(result: Result, overrides: Iterable[str] = (), *, trust: bool = False) -> Opened[StudyComponents]:
    """Load the model and the score of a result; ``overrides`` are ``key=value`` settings, as of a study file.

    ``ConfigError`` where the result does not fit the model.
    """
    return _compared(result, build(_config(result, overrides), trust=trust))


def open_images(result: Result, overrides: Iterable[str] = (), *, trust: bool = False) -> Opened[ImageComponents]:
    """As ``open_result``, to draw images alone: no reference is looked at."""
    return _compared(result, build_images(_config(result, overrides), trust=trust))


def _config(result: Result, overrides: Iterable[str]) -> StudyConfig:
    settings = {"solver", "final", "guidance", "eta", "amplification_cap"}
    table = {  # of a study of one candidate that makes and scores images as the result says
        "name": result.study,
        "sampling": {**result.model_dump(include=settings, exclude_none=True), "steps": len(result.timesteps)},
        "search": {"trials": 1, "warm_starts": ["uniform"]},
        **result.config.model_dump(mode="json"),
    }
    return parse_config(table, overrides)


def _compared(result: Result, components: C) -> Opened[C]:
    found = result.candidate(components.model.units, components.model.schedule.T)
    uniform = Candidate(BASELINES["uniform"](components.model.schedule, found.steps))
    name = "found" if result.study == "uniform" else result.study  # a study may have any name
    return Opened(components, {"uniform": uniform, name: found}, other_model(result, components.model))


def other_model(result: Result, model: Model) -> str | None:
    """One line of what sets a model apart from the one that a result was found on; None where it is that one."""
    found = differences(result, model)
    start = f"model {model.name} is not the one that {result} was found on: "
    return start + ", ".join(found) if found else None


def differences(result: Result, model: Model) -> list[str]:
    """What a model has otherwise than the one that a result was found on; empty where it is the same one."""
    part = result.model
    denoiser = model.denoiser if isinstance(model.denoiser, Denoiser) else None
    pairs: list[tuple[str, Any, Any]] = [  # None: not known, or there is none
        ("kind", part.kind, model.kind),
        ("prediction", part.prediction, denoiser and denoiser.prediction),
        ("clip", part.clip, denoiser and denoiser.clip),
        ("guidance", part.guidance, model.guidance),
        ("shape", part.shape, model.shape),
        ("image shape", part.image_shape, model.picture_shape),
        ("latent scale", part.latent_scale, model.latent_scale),
    ]
    known = [pair for pair in pairs if None not in pair]
    found = [f"{name} {_shown(now)} instead of {_shown(then)}" for name, then, now in known if not _same(then, now)]
    then, now = result.noise_schedule(), model.schedule
    if then.T != now.T or not np.allclose(then.lambdas, now.lambdas, atol=1e-6):
        found.append("another noise schedule")
    if part.units != model.units:
        found.append(f"other layers ({len(model.units)} instead of {len(part.units)})")
    if result.conditions != (model.conditions and model.conditions.fingerprint):
        found.append("other labels or prompts")
    if part.weights is not None and model.weights is not None and not same_weights(part.weights, model.weights):
        found.insert(0, "other weights")
    elif part.sha256 != model.fingerprint:
        found.insert(0, "other files, of weights or configs")
    return found


def _same(then: Any, now: Any) -> bool:
    return math.isclose(then, now, rel_tol=1e-5) if isinstance(then, float) else then == now


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def doubts(opened: Opened[ImageComponents]) -> list[str]:
    """What is doubtful about the model, by a few samples of its own; none where ``model.check`` is off."""
    parts = opened.components
    return check_model(parts.model, None, parts.images.batch) if parts.config.model.check else []


def score_compared(opened: Opened[StudyComponents]) -> dict[str, HeldOut]:
    """Values of uniform and of the result on the config's held-out banks."""
    score, evaluator = opened.components.config.score, opened.components.evaluator
    banks = range(1, score.held_out_banks + 1)
    return {
        name: HeldOut(
            score.held_out_images,
            tuple(evaluator.score(candidate, [score.held_out_images], bank=bank).value for bank in banks),
        )
        for name, candidate in opened.compared.items()
    }
