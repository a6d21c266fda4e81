"""A tiny ADM and its classifier, from the golden data of the official code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

CLASSIFIER_FIELDS: dict[str, Any] = {
    "num_classes": 10,
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_channel_mult": "1,1",
    "classifier_attention_resolutions": "8",
    "classifier_num_head_channels": 16,
}


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of one golden file."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict among golden tensors, under the names of a published checkpoint."""
    return {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}


def write_adm(folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Checkpoints of a class-conditional ADM on 3x16x16 images of 10 classes and of its classifier, and their fields.

    Give the paths as ``adm:PATH`` and ``ModelConfig.classifier``, and the fields as ``ModelConfig.fields``.
    """
    paths = folder / "adm.pt", folder / "adm_classifier.pt"
    for name, path in zip(("adm_unet_a", "adm_classifier"), paths, strict=True):
        torch.save(state(golden(name)[1]), path)
    return *paths, {**golden("adm_unet_a")[0]["create_model"], **CLASSIFIER_FIELDS}
