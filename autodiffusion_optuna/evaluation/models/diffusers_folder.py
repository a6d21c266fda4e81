"""Models from a local folder that diffusers saved: an unconditional UNet2DModel over pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.denoiser import PREDICTIONS, Denoiser
from autodiffusion_optuna.evaluation.models.base import Model, find_device
from autodiffusion_optuna.evaluation.skip import Units, find_units
from autodiffusion_optuna.noise import NoiseSchedule, from_scheduler_config

NETWORK = "UNet2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True)
class _Files:
    """Where the parts of one model lie; all of them exist."""

    config: Path
    weights: Path
    scheduler: Path


def load_folder(
    folder: Path, device: str = "cpu", precision: str = "float32", clip: bool = False, name: str = ""
) -> Model:
    """The model in ``folder``, which holds a pipeline (``unet/``, ``scheduler/``) or the parts of one.

    The flat layout has ``config.json`` and ``diffusion_pytorch_model.safetensors`` at the top and
    ``scheduler_config.json`` beside them or in ``scheduler/``. Only safetensors are read and nothing is
    downloaded. ``name`` defaults to the folder's.
    ``ModelError`` where a part is missing or broken, or the model is of a kind not supported.
    """
    place = find_device(device)
    files = _find_files(folder)
    config, scheduler = _read_json(files.config), _read_json(files.scheduler)
    shape = _check_network(config, files.config)
    schedule = _schedule(scheduler, files.scheduler)
    prediction = _prediction(scheduler, files.scheduler)
    network = _load_network(config, files).to(place)
    units = _units(network, shape, place, files)

    def predict(x: Tensor, model_times: Tensor) -> Tensor:
        prediction: Tensor = network(x, model_times, return_dict=False)[0]
        return prediction

    denoiser = Denoiser(predict, schedule, prediction, place, precision, clip, units)
    fingerprint = _fingerprint(files, config, scheduler)
    return Model(name or folder.resolve().name, fingerprint, shape, schedule, denoiser, place, units.names)


def _find_files(folder: Path) -> _Files:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give one that diffusers' save_pretrained wrote")
    index = folder / "model_index.json"
    parts = _read_json(index) if index.is_file() else {}
    latent = sorted({"vae", "vqvae"} & parts.keys())
    if latent:
        raise ModelError(f"{folder}: the pipeline has a {latent[0]}; latent models are not supported, pixel ones are")
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    places = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER]
    scheduler = next((place for place in places if place.is_file()), None)
    for needed in (unet / "config.json", unet / WEIGHTS):
        if not needed.is_file():
            raise ModelError(_missing(needed))
    if scheduler is None:
        raise ModelError(
            f"{folder}: no noise schedule; looked for {SCHEDULER} and scheduler/{SCHEDULER}. "
            "Save the scheduler the model was trained with there (scheduler.save_pretrained)"
        )
    return _Files(unet / "config.json", unet / WEIGHTS, scheduler)


def _missing(needed: Path) -> str:
    """One line for a file that is not there, with what to do if the weights are in another format."""
    if needed.name == WEIGHTS:
        others = sorted(path.name for path in needed.parent.glob("diffusion_pytorch_model*"))
        if others:
            return (
                f"{needed.parent}: holds {', '.join(others)}, but only {WEIGHTS} is read; "
                "load the model in diffusers and save it with save_pretrained(safe_serialization=True)"
            )
    return f"{needed.parent}: no {needed.name}; give a folder that diffusers' save_pretrained wrote"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({_first_line(error)}); save it anew") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds a JSON {type(data).__name__}, expected an object; save it anew")
    return data


def _check_network(config: Mapping[str, Any], path: Path) -> tuple[int, int, int]:
    """(C, H, W) of a config's images; ``ModelError`` where such a network is not supported."""
    kind = config.get("_class_name")
    if kind != NETWORK:
        raise ModelError(f"{path}: describes a {kind}; only {NETWORK} is supported")
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise ModelError(f"{path}: the model is class-conditional; only unconditional models are supported so far")
    size, channels, out = (config.get(key) for key in ("sample_size", "in_channels", "out_channels"))
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"{path}: sample_size is {size!r}; set it to the side of the images, or [height, width]")
    if not isinstance(channels, int) or out not in (channels, 2 * channels):
        raise ModelError(
            f"{path}: {channels} channels in and {out} out; expected as many out as in, "
            "or twice as many (learned variance)"
        )
    return channels, sides[0], sides[1]


def _schedule(config: Mapping[str, Any], path: Path) -> NoiseSchedule:
    kind = str(config.get("_class_name", ""))
    if not ({"beta_schedule", "trained_betas"} & config.keys() or "FlowMatch" in kind):
        raise ModelError(f"{path}: {kind or 'this config'} has no betas; save a DDPM- or flow-matching scheduler")
    try:
        return from_scheduler_config(config)
    except (ConfigError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: {_first_line(error)}") from error


def _prediction(config: Mapping[str, Any], path: Path) -> str:
    """What the network predicts; flow-matching schedulers do not say, as they know of one kind only."""
    flow = "FlowMatch" in str(config.get("_class_name", ""))
    kind = config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")
    if kind not in PREDICTIONS:
        raise ModelError(f"{path}: {choose_from('prediction_type', str(kind), PREDICTIONS)}")
    return str(kind)


def _units(network: nn.Module, shape: tuple[int, int, int], device: torch.device, files: _Files) -> Units:
    x, t = torch.zeros(1, *shape, device=device), torch.zeros(1, device=device)
    try:
        return find_units(network, lambda: network(x, t))
    except RuntimeError as error:
        raise ModelError(
            f"{files.config}: the network does not run on {list(shape)} images ({_first_line(error)})"
        ) from error


def _load_network(config: Mapping[str, Any], files: _Files) -> nn.Module:
    """The network with its weights, frozen. Neither diffusers' warnings nor its lists of keys are shown."""
    from diffusers import UNet2DModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network: nn.Module = UNet2DModel.from_config(dict(config))
    except Exception as error:  # whatever a constructor makes of a wrong value
        raise ModelError(f"{files.config}: diffusers cannot build this model ({_first_line(error)})") from error
    try:
        stored = load_file(files.weights)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{files.weights}: is damaged or cut short ({_first_line(error)}); copy it anew") from error
    weights = {_modern(key): value for key, value in stored.items()}
    _check_weights(weights, network.state_dict(), files)
    network.load_state_dict(weights)
    return network.float().eval().requires_grad_(False)


LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern(key: str) -> str:
    """The present name of a weight; older versions of diffusers named attention's projections otherwise."""
    return ".".join(LEGACY.get(part, part) for part in key.split("."))


def _check_weights(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], files: _Files) -> None:
    """``ModelError`` that names the first weight that does not fit."""
    fits = f"{files.weights}: weights do not fit {files.config.name}, "
    for key in sorted(given.keys() & wanted.keys()):
        shape, expected = list(given[key].shape), list(wanted[key].shape)
        if shape != expected:
            raise ModelError(f"{fits}{key} has shape {shape} instead of {expected}; take both from one model")
    for what, keys in (
        ("missing", wanted.keys() - given.keys()),
        ("unexpected", given.keys() - wanted.keys()),
    ):
        if keys:
            raise ModelError(f"{fits}{len(keys)} {what}, first {min(keys)!r}; take both from one model")


def _fingerprint(files: _Files, *configs: Mapping[str, Any]) -> str:
    """sha256 over the weights file and the configs, without what tells only where they came from."""
    ignored = {"_diffusers_version", "_name_or_path"}
    digest = hashlib.sha256()
    for config in configs:
        kept = {key: value for key, value in config.items() if key not in ignored}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    with files.weights.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
