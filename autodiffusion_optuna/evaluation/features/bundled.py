"""Extractors that need no weights from outside: the bundled digits network, and the pixels themselves."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features.base import Extractor, Wanted, check_floats, fingerprint
from autodiffusion_optuna.evaluation.features.digits_net import FEATURES, DigitsNet
from autodiffusion_optuna.evaluation.features.weights import sha256_of

DIGITS_WEIGHTS = Path(__file__).parent.parent.parent / "assets" / "digits" / "extractor.safetensors"
MAX_PIXELS = 4096


def load_digits(wanted: Wanted) -> Extractor:
    """64 features of 28x28 grey images."""
    path, net = wanted.weights or DIGITS_WEIGHTS, DigitsNet()
    with wanted.reading(path, "does not hold its network", "leave the weights out to use the bundled ones"):
        stored = load_file(path)
        check_floats(stored, path)
        net.load_state_dict(stored)
    net = net.eval().requires_grad_(False).to(wanted.device)
    return Extractor(
        "digits",
        fingerprint("digits", sha256_of(path), resize="none", size=28),
        FEATURES,
        wanted.device,
        lambda images: net.features(images.float() / 255),
        image_shape=(1, 28, 28),
    )


def load_pixels(wanted: Wanted) -> Extractor:
    """The pixels themselves."""
    wanted.refuse_weights()
    unchanged = fingerprint("pixels", None, resize="none", size=None)
    return Extractor("pixels", unchanged, None, wanted.device, _flat_pixels)


def _flat_pixels(images: Tensor) -> Tensor:
    """Pixels in 0..255 as float32 [B, C * H * W]."""
    pixels = images[0].numel() if len(images) else 0
    if pixels > MAX_PIXELS:
        raise StatisticsError(
            f"extractor 'pixels' was given images of {pixels} values; it takes at most {MAX_PIXELS}: "
            "choose another extractor for images of this size"
        )
    return images.flatten(1).float()
