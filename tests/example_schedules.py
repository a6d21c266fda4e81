"""Schedules without a study, and the images that our own sampler draws by them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from autodiffusion_optuna.config import ModelConfig, ScoreConfig
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, cached_denoise
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.solvers import times
from autodiffusion_optuna.export.schedule import ConfigPart, ModelPart, NoisePart, Result, ScorePart
from autodiffusion_optuna.noise import NoiseSchedule, linear

OPTIONS = ("clip", "fields", "negative_prompt", "prompts", "size")


def example(noise: NoiseSchedule | None = None, **fields: Any) -> Result:
    """A schedule of 3 steps of a UNet2DModel; keywords replace its fields. ``model``: a dict replaces fields of it."""
    noise = noise or linear()
    model: Any = fields.pop("model", {})
    if isinstance(model, dict):
        part = {"source": "net", "sha256": "0", "kind": "UNet2DModel", "prediction": "epsilon", "clip": False}
        model = ModelPart(**{**part, **model})
    given: dict[str, Any] = {
        "study": "mine",
        "model": model,
        "train_timesteps": noise.T,
        "solver": "ddim",
        "final": "zero",
        "timesteps": (901, 500, 40),
        "cost": 1.0,
        "score": ScorePart(metric="FD(pixels)", value=1.25, images=64),
        **fields,
    }
    given.setdefault("skips", ((),) * len(given["timesteps"]))
    given.setdefault("noise", NoisePart.of(noise, given["timesteps"], given["final"]))
    return Result(**given)


def schedule_of(source: Path, options: dict[str, Any] | None = None, **fields: Any) -> Result:
    """A schedule of the model in a folder. ``options``: as in the study's ``[model]``; ``fields``: of ``Schedule``.

    ``skips``: indices of units by step.
    """
    model = open_model(str(source), options)
    assert isinstance(model.denoiser, Denoiser)
    part = ModelPart(
        source=str(source),
        sha256=model.fingerprint,
        kind=model.kind,
        prediction=model.denoiser.prediction,
        clip=model.denoiser.clip,
        guidance=model.guidance,
        shape=model.shape,
        image_shape=model.picture_shape,
        latent_scale=model.latent_scale,
        weights=model.weights and dict(model.weights),
        units=model.units,
    )
    if "skips" in fields:
        fields["skips"] = tuple(tuple(model.units[u] for u in step) for step in fields["skips"])
    given: dict[str, Any] = {
        "guidance": None if model.guidance == "none" else model.scale,
        "conditions": model.conditions and model.conditions.fingerprint,
        "config": ConfigPart(
            model=ModelConfig(source=str(source), **options or {}), score=ScoreConfig(extractor="pixels")
        ),
    }
    return example(model.schedule, model=part, **{**given, **fields})


def open_model(source: str, options: dict[str, Any] | None = None) -> Model:
    """The model as a study opens it; the same one is not loaded twice in a row."""
    return _open(str(Path(source).resolve()), json.dumps(options or {}))


@functools.lru_cache(maxsize=2)
def _open(source: str, options: str) -> Model:
    return load_model(ModelConfig(source=source, **json.loads(options)))


def ours(schedule: Result, images: int, chosen: Sequence[int] = ()) -> torch.Tensor:
    """uint8 [images, C, H, W] of our own sampler, from the noise that diffusers' pipelines draw for seed 0."""
    assert schedule.config is not None
    settings = schedule.config.model.model_dump(mode="json", exclude_defaults=True)
    model = open_model(schedule.model.source, {key: value for key, value in settings.items() if key in OPTIONS})
    candidate = schedule.candidate(model.units, T=model.schedule.T)
    sampling = Sampling(**schedule.sampling_settings())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, *model.shape, generator=generator)
    solve = sampling.find_solver(lambda step: torch.randn(x.shape, generator=generator))
    nodes = times(model.schedule, candidate.timesteps, sampling.final)
    denoise = cached_denoise(model.bind(chosen, sampling.guidance), candidate, None, (), NfeCounter())
    return model.to_images(solve(denoise, x, nodes))
