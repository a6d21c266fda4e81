"""Inception through clean-fid, in its three modes (arXiv 2104.11222)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from autodiffusion_optuna.config import Mode
from autodiffusion_optuna.evaluation.features.base import Extractor, Network, Wanted, check_floats, resize_clean

SIZE = 299
FEATURES = 2048
TORCHSCRIPT, PYTORCH = "inception-2015-12-05.pt", "pt_inception-2015-12-05-6726825d.pth"


def load_inception(wanted: Wanted) -> Extractor:
    """2,048 features; ``wanted.mode`` decides the resize and the file of weights."""
    mode = wanted.mode or "clean"
    weights = wanted.require()
    net = _pytorch(wanted, weights) if mode == "legacy_pytorch" else _torchscript(wanted, weights)

    def network(images: Tensor) -> Tensor:
        # Resized before it is repeated: a grey image costs one channel.
        return net(RESIZE[mode](images).expand(-1, 3, -1, -1))

    return wanted.extractor(network, FEATURES, weights, mode, SIZE)


def _resize_bilinear(images: Tensor) -> Tensor:
    """pytorch-fid's: bilinear without antialiasing, float32 in 0..255."""
    return F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", align_corners=False).clamp_(0, 255)


RESIZE: dict[Mode, Network] = {
    "clean": resize_clean,
    "legacy_pytorch": _resize_bilinear,
    "legacy_tensorflow": lambda images: images.float(),  # the network does it
}


def _torchscript(wanted: Wanted, weights: Path) -> Network:
    """clean-fid's wrapper around the TorchScript file: float32 [B, 3, H, W] in 0..255 to [B, 2048].

    H and W are 299, or any in mode legacy_tensorflow.
    """
    # This module of clean-fid needs no torchvision, which the package's others import.
    package = wanted.import_package("cleanfid.inception_torchscript", "pip install clean-fid")
    inside = wanted.mode == "legacy_tensorflow"
    reading = wanted.reading(weights, "is not the TorchScript Inception of clean-fid", f"give a complete {TORCHSCRIPT}")
    with tempfile.TemporaryDirectory() as folder, reading:
        shutil.copyfile(weights, Path(folder) / TORCHSCRIPT)  # clean-fid takes a folder and its own file name
        net = package.InceptionV3W(folder, download=False, resize_inside=inside).to(wanted.device).eval()
    return lambda images: net(images)


def _pytorch(wanted: Wanted, weights: Path) -> Network:
    """pytorch-fid's network, as clean-fid carries it: float32 [B, 3, 299, 299] in 0..255 to [B, 2048]."""
    package = wanted.import_package(
        "cleanfid.inception_pytorch",
        "pip install clean-fid torchvision, the latter from where torch is from",
        f" in mode {wanted.mode}",
    )
    with wanted.reading(weights, "does not hold pytorch-fid's network", f"give a complete {PYTORCH}"):
        state = torch.load(weights, map_location="cpu", weights_only=True)
        check_floats(state, weights)
        # The constructor downloads; it is handed the local weights instead.
        with mock.patch.object(package, "load_state_dict_from_url", return_value=state):
            net = package.InceptionV3(output_blocks=[3], resize_input=False).to(wanted.device).eval()
    return lambda images: net(images / 255)[0].flatten(1)
