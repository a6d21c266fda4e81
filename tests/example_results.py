"""Results without a study, and the images that our own sampler draws by them."""

from __future__ import annotations

import functools
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodiffusion_optuna.config import ModelConfig, ScoreConfig
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.export.draw import draw
from autodiffusion_optuna.export.formats import result_text
from autodiffusion_optuna.export.result import ConfigPart, ModelPart, NoisePart, Result, ScorePart
from autodiffusion_optuna.noise import NoiseSchedule, linear

OPTIONS = ("clip", "fields", "negative_prompt", "prompts", "size")


def example(noise: NoiseSchedule | None = None, **fields: Any) -> Result:
    """A result of 3 steps of a UNet2DModel; keywords replace its fields. ``model``: a dict replaces fields of it."""
    noise = noise or linear()
    model: Any = fields.pop("model", {})
    if isinstance(model, dict):
        part = {"source": "net", "sha256": "0", "kind": "UNet2DModel", "prediction": "epsilon", "clip": False}
        shapes = {"shape": (3, 16, 16), "image_shape": (3, 16, 16), "units": ()}
        model = ModelPart(**{**part, **shapes, **model})
    given: dict[str, Any] = {
        "study": "mine",
        "model": model,
        "train_timesteps": noise.T,
        "solver": "ddim",
        "final": "zero",
        "timesteps": (901, 500, 40),
        "cost": 1.0,
        "score": ScorePart(metric="FD(pixels)", value=1.25, images=64),
        "config": ConfigPart(model=ModelConfig(source=model.source), score=ScoreConfig(extractor="pixels")),
        **fields,
    }
    for name in ("skips", "reuses"):
        given.setdefault(name, ((),) * len(given["timesteps"]))
    given.setdefault("noise", NoisePart.of(noise, given["timesteps"], given["final"]))
    return Result(**given)


def result_for(source: Path, options: dict[str, Any] | None = None, **fields: Any) -> Result:
    """A result of the model in a folder. ``options``: as in the study's ``[model]``; ``fields``: of ``Result``.

    ``skips``, ``reuses``: indices of units by step.
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
    for name in {"skips", "reuses"} & fields.keys():
        fields[name] = tuple(tuple(model.units[u] for u in step) for step in fields[name])
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


def ours(result: Result, images: int, chosen: Sequence[int] = ()) -> torch.Tensor:
    """uint8 [images, C, H, W] of our own sampler on the result's model; see ``draw``."""
    settings = result.config.model.model_dump(mode="json", exclude_defaults=True)
    model = open_model(result.model.source, {key: value for key, value in settings.items() if key in OPTIONS})
    return draw(result, model, images, chosen)


def run_script(folder: Path, result: Result) -> torch.Tensor:
    """int32 [B, C, H, W] that the script draws, run as printed in the folder of its JSON."""
    result.write(folder / f"{result.study}.json")
    script = folder / f"{result.study}.py"
    script.write_text(result_text(result, "diffusers"))
    images = runpy.run_path(str(script))["images"]
    if isinstance(images, torch.Tensor):
        return images.int()
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).int()
