"""Models by name, path, hub id or plug-in, each made into one ``Model``."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.files import check_content
from autodiffusion_optuna.evaluation.models.base import Conditions, Model, Options, find_device
from autodiffusion_optuna.evaluation.models.diffusers_folder import NETWORK, load_folder
from autodiffusion_optuna.evaluation.models.mixture import mixture_model
from autodiffusion_optuna.evaluation.models.parts import read_checkpoint
from autodiffusion_optuna.evaluation.references.reference import load_reference

__all__ = ["MODELS", "Conditions", "Model", "Options", "find_device", "load_model"]

Loader = Callable[[str, str, bool], Model]

DIGITS = Path(__file__).parent.parent.parent / "assets" / "digits"

MODELS: dict[str, Loader] = {
    "digits": lambda device, precision, clip: _digits(device, precision, clip),
    "mixture": lambda device, precision, clip: mixture_model(device=device, clip=clip),
}
"""Name -> (device, precision, clip) -> model."""

PIPELINES = {
    "StableDiffusionPipeline": "text",
    "StableDiffusionXLPipeline": "text",
    "StableDiffusion3Pipeline": "text",
    "FluxPipeline": "text",
    "DiTPipeline": "dit",
}
"""Pipeline class of a diffusers folder -> loader; every other folder is one of a UNet2DModel."""

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def _digits(device: str, precision: str, clip: bool) -> Model:
    """The bundled model, with the statistics of the digits it was trained on."""
    model = load_folder(DIGITS, device, precision, clip, name="digits")
    return replace(model, reference=partial(load_reference, DIGITS / "reference.npz"))


def load_model(
    source: str,
    device: str = "cpu",
    precision: str = "float32",
    clip: bool | None = False,
    options: Options | None = None,
) -> Model:
    """The model that ``source`` names, frozen and on its device.

    ``source``: a name of ``MODELS``; a folder that diffusers saved; a hub id, ``org/name`` or
    ``org/name@revision``; ``adm:FILE``, a guided-diffusion checkpoint; a single ``FILE.safetensors`` of a
    text-to-image model; or ``python:module:function``.
    ``device``: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    ``precision``: of the network, a name of ``denoiser.PRECISIONS``. ``clip``: clamp x0 to [-1, 1]; None: for
    models of pixels. ``options``: everything else.
    Only a hub id is ever downloaded. ``ModelError`` where the model or the device cannot be used, ``ConfigError``
    where another argument is wrong.
    """
    try:
        return _load(source, device, precision, clip, options or Options())
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{source}: the device has too little memory for this model; use a lower model.precision or another device"
        ) from None


def _load(source: str, device: str, precision: str, clip: bool | None, options: Options) -> Model:
    scheme, colon, rest = source.partition(":")
    if source in MODELS:
        return _bundled(source, device, precision, clip, options)
    if colon and scheme == "adm":
        from autodiffusion_optuna.evaluation.models.adm import load_adm

        return load_adm(Path(rest), device, precision, clip is not False, options)
    if colon and scheme == "python":
        from autodiffusion_optuna.evaluation.models.plugin import load_plugin

        return load_plugin(source, device, precision, clip, options)
    if Path(source).is_dir():
        return _folder(Path(source), device, precision, clip, Path(source).resolve().name, options)
    if Path(source).suffix.lower() == ".gguf":
        raise ModelError(
            f"{source}: is a GGUF file, whose weights are quantised; give safetensors or a diffusers folder"
        )
    if Path(source).suffix in SINGLE_FILES:
        return _single_file(Path(source), device, precision, clip, options)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from autodiffusion_optuna.evaluation.models.hub import resolve

        return _folder(resolve(source), device, precision, clip, source, options)
    raise ModelError(
        f"{choose_from('model', source, MODELS)}; or the path of a diffusers folder, a hub id (org/name), adm:FILE.pt "
        "or python:module:function"
    )


def _bundled(name: str, device: str, precision: str, clip: bool | None, options: Options) -> Model:
    for setting in ("preset", "fields", "classifier", "prompts", "negative_prompt", "size", "config"):
        if getattr(options, setting):
            raise ConfigError(f"model.{setting} was given, but the bundled model {name!r} takes none; leave it out")
    return MODELS[name](device, precision, clip is not False)


def _folder(folder: Path, device: str, precision: str, clip: bool | None, name: str, options: Options) -> Model:
    folder, network = _whole(folder)
    index = _index(folder)
    kind = PIPELINES.get(str(index.get("_class_name", "")), "unet")
    if kind == "text":
        from autodiffusion_optuna.evaluation.models.text_to_image import load_text_to_image

        return load_text_to_image(folder, device, precision, clip, name, options, network)
    if kind == "dit":
        from autodiffusion_optuna.evaluation.models.dit import load_dit

        return load_dit(folder, device, precision, clip, name, options, network)
    _check_plain(folder, index)
    return load_folder(folder, device, precision, clip, name, options, network)


def _whole(folder: Path) -> tuple[Path, str]:
    """The pipeline's folder, and which folder in it is to be its network: ``""`` for the one that it names itself.

    A source such as ``.../unet_ema`` has the rest of its pipeline, a decoder too, beside it.
    """
    parent = Path(os.path.abspath(folder)).parent
    part = (folder / "config.json").is_file() and not (folder / INDEX).exists() and (parent / INDEX).is_file()
    return (parent, os.path.basename(os.path.abspath(folder))) if part else (folder, "")


def _index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of a pipeline; empty where there is none, or it cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _check_plain(folder: Path, index: Mapping[str, Any]) -> None:
    """``ModelError`` for a pipeline of another network than a UNet2DModel, with those that are supported."""
    for part in ("unet", "transformer", "prior"):
        entry = index.get(part)
        if isinstance(entry, list) and None not in entry and entry[-1] != NETWORK:
            raise ModelError(
                f"{folder}: is a {index.get('_class_name')} with a {entry[-1]}; supported are {', '.join(PIPELINES)} "
                f"and pipelines of a {NETWORK}; write a plug-in for others (python:module:function)"
            )


def _single_file(path: Path, device: str, precision: str, clip: bool | None, options: Options) -> Model:
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
    from autodiffusion_optuna.evaluation.models.text_to_image import load_single_file

    return load_single_file(path, device, precision, clip, path.stem, options)
