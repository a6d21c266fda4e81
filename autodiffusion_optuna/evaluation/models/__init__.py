"""Models by name, path, hub id or plug-in, each made into one ``Model``."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from autodiffusion_optuna.config import MEMORY, ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.models.adm import load_adm
from autodiffusion_optuna.evaluation.models.base import Conditions, Floor, Model, check_unused, find_device
from autodiffusion_optuna.evaluation.models.checkpoints import read_checkpoint
from autodiffusion_optuna.evaluation.models.diffusers_folder import UNET, load_folder
from autodiffusion_optuna.evaluation.models.hub import resolve
from autodiffusion_optuna.evaluation.models.mixture import mixture_model
from autodiffusion_optuna.evaluation.models.parts import Pipeline, find_pipeline
from autodiffusion_optuna.evaluation.models.plugin import load_plugin
from autodiffusion_optuna.evaluation.models.text_to_image import PIPELINES, load_text_to_image
from autodiffusion_optuna.evaluation.references.reference import load_reference
from autodiffusion_optuna.files import check_content

__all__ = ["MODELS", "Conditions", "Model", "check_source", "find_device", "load_model"]

ASSETS = Path(__file__).parent.parent.parent / "assets"
DIGITS = ASSETS / "digits"


def _bundled(name: str, config: ModelConfig, device: torch.device) -> Model:
    """A bundled model, with the statistics of the images it was trained on, and what real images score."""
    model, folder = load_folder(config, device, find_pipeline(ASSETS / name), name), ASSETS / name
    return replace(model, reference=partial(load_reference, folder / "reference.npz"), floor=_floor(folder))


def _floor(folder: Path) -> Floor | None:
    """What ``training.json`` of a bundled model says of real images, if it does."""
    said = json.loads((folder / "training.json").read_text()).get("floor")
    if said is None:
        return None
    return Floor(said["extractor"], {int(images): value for images, value in said["values"].items()})


def _mixture(config: ModelConfig, device: torch.device) -> Model:
    return mixture_model(device=str(device), clip=config.clip is not False)


MODELS: dict[str, Callable[[ModelConfig, torch.device], Model]] = {
    "digits": partial(_bundled, "digits"),
    "faces": partial(_bundled, "faces"),
    "mixture": _mixture,
}
"""Bundled models by name."""

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def load_model(config: ModelConfig, *, device: str | None = None, trust: bool = False) -> Model:
    """The model that ``config.source`` names, frozen and on its device.

    ``device``: in place of ``config.device``. ``trust``: allow Python plug-ins, whose code is run.
    Only a hub id is ever downloaded. ``ModelError`` where the model or the device cannot be used, ``ConfigError``
    where a setting does not suit the model.
    """
    place = find_device(device or config.device)
    try:
        return _load(config, place, trust)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{config.source}: the device has too little memory for this model; use a lower model.precision or "
            "another device"
        ) from None


def check_source(config: ModelConfig) -> None:
    """What ``load_model`` would refuse of a source's name, and of settings that a bundled model does not take."""
    source, path = config.source, Path(config.source)
    if source in MODELS:
        check_unused(config, source)
    elif not (path.exists() or source.startswith(("adm:", "python:")) or path.suffix in (*SINGLE_FILES, ".gguf")):
        is_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
        if not is_id:
            raise _unknown(source)


def _unknown(source: str) -> ModelError:
    return ModelError(
        f"{choose_from('model', source, MODELS)}; or the path of a diffusers folder, a hub id (org/name), adm:FILE.pt "
        "or python:module:function"
    )


def _load(config: ModelConfig, device: torch.device, trust: bool) -> Model:
    source = config.source
    path = Path(source)
    scheme, colon, rest = source.partition(":")
    if source in MODELS:
        check_unused(config, source)
        return MODELS[source](config, device)
    if source.startswith(MEMORY):
        raise ModelError(
            f"{source}: the study was begun in Python with a model in memory; go on there with "
            "autodiffusion_optuna.search(model, ..., name=..., storage=...)"
        )
    if colon and scheme == "adm":
        return load_adm(config, device, Path(rest))
    if colon and scheme == "python":
        return load_plugin(config, device, trust)
    if path.is_dir():
        return _folder(config, device, path, path.resolve().name)
    if path.suffix.lower() == ".gguf":
        raise ModelError(
            f"{source}: is a GGUF file, whose weights are quantised; give safetensors or a diffusers folder"
        )
    if path.suffix in SINGLE_FILES:
        return _single_file(config, device, path)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _folder(config, device, resolve(source), source)
    raise _unknown(source)


def _folder(config: ModelConfig, device: torch.device, folder: Path, name: str) -> Model:
    pipeline = find_pipeline(folder)
    if pipeline.kind in PIPELINES:
        return load_text_to_image(config, device, pipeline, name)
    if pipeline.kind != "DiTPipeline":
        _check_plain(pipeline)
    return load_folder(config, device, pipeline, name)


def _check_plain(pipeline: Pipeline) -> None:
    """``ModelError`` for a pipeline of another network than a UNet2DModel, with those that are supported."""
    for part in ("unet", "transformer", "prior"):
        entry = pipeline.index.get(part)
        if isinstance(entry, list) and None not in entry and entry[-1] != UNET:
            raise ModelError(
                f"{pipeline.folder}: is a {pipeline.kind} with a {entry[-1]}; supported are {', '.join(PIPELINES)}, "
                f"DiTPipeline and pipelines of a {UNET}; write a plug-in for others (python:module:function)"
            )


def _single_file(config: ModelConfig, device: torch.device, path: Path) -> Model:
    """With everything but the denoising network, the decoder and the text encoders too, from ``config.config``."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of a checkpoint, or a folder that diffusers saved")
    check_content(path, ModelError)
    if path.suffix != ".safetensors":
        if zipfile.is_zipfile(path):
            read_checkpoint(path)  # which refuses what holds no weights at all
        raise ModelError(
            f"{path}: a bare {path.suffix} file says nothing of its architecture; for a guided-diffusion checkpoint "
            f"write adm:{path} with model.preset, for others give safetensors or a diffusers folder"
        )
    if config.config is None:
        raise ConfigError(
            f"{path}: a single file holds neither configs nor a noise schedule; set model.config to the folder of a "
            "diffusers pipeline of the same kind"
        )
    return load_text_to_image(config, device, find_pipeline(Path(config.config)), path.stem, path)
