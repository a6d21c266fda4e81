"""DINOv2: the class token of a transformers folder, or of a TorchScript export."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.features.base import Extractor, Network, Wanted
from autodiffusion_optuna.evaluation.features.user import read_torchscript
from autodiffusion_optuna.evaluation.features.weights import sha256_of
from autodiffusion_optuna.evaluation.tensors import check_numbers, plain_weights
from autodiffusion_optuna.files import check_content, read_json

SIZE = 224
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_dinov2(wanted: Wanted) -> Extractor:
    """The class token, as many features as the network has."""
    weights = wanted.require()
    if weights.is_dir():
        net, digest = _read_folder(wanted, weights)
    else:
        net, digest = read_torchscript(wanted, weights), sha256_of(weights)
    mean, std = (torch.tensor(values, device=wanted.device).view(1, 3, 1, 1) for values in IMAGENET)

    def network(images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
        return net((resized / 255 - mean) / std)

    extractor = wanted.extractor(wanted.guard(network), None, digest, "bicubic", SIZE)
    return replace(extractor, dim=extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1])


def _read_folder(wanted: Wanted, folder: Path) -> tuple[Network, str]:
    """The normalised class token float32 [B, D], and the hash of the folder's config and weights."""
    _check_folder(folder)
    package = wanted.import_package("transformers", "pip install transformers", " from a folder")
    log = package.utils.logging
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        with wanted.reading(folder, "cannot be loaded", "save the model again"):
            net, info = package.Dinov2Model.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="eager",
                output_loading_info=True,
            )
            stored = load_file(folder / WEIGHTS)
            check_numbers(plain_weights(stored, folder / WEIGHTS), stored, folder)
            unknown = {key for key in info["unexpected_keys"] if not key.startswith("classifier.")}
            if unfit := sorted({*info["missing_keys"], *unknown}):
                raise ValueError(f"{len(unfit)} weights are missing or of another model, first {unfit[0]!r}")
    finally:
        if bars:
            log.enable_progress_bar()
    net = net.float().to(wanted.device).eval().requires_grad_(False)
    hashes = (sha256_of(folder / name) for name in (CONFIG, WEIGHTS))
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return lambda images: net(pixel_values=images).last_hidden_state[:, 0], digest


def _check_folder(folder: Path) -> None:
    where = f"extractor 'dinov2': folder {str(folder)!r}"
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{where} has no {name}; give one written by Dinov2Model.save_pretrained")
        check_content(folder / name, ModelError)
    kind = read_json(folder / CONFIG).get("model_type")
    if kind != "dinov2":
        raise ModelError(f"{where} holds a {kind!r} model; give a 'dinov2' one")
