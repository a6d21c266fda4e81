"""Extractors that need no weights from outside: the bundled digits network, and the pixels themselves."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features.base import Extractor, Wanted, check_floats, fingerprint
from autodiffusion_optuna.evaluation.features.weights import sha256_of

DIGITS_WEIGHTS = Path(__file__).parent.parent.parent / "assets" / "digits" / "extractor.safetensors"
DIGITS_FEATURES = 64
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
        DIGITS_FEATURES,
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


class DigitsNet(nn.Module):
    """Logits float32 [B, 10] of ``images`` float32 [B, 1, 28, 28] in [0, 1]: a small classifier of handwritten digits.

    A stand-in for Inception. Its features ignore what a reader of digits ignores, so a Fréchet distance over them rises
    when strokes break or digits stop being digits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(1, 16),
            nn.MaxPool2d(2),
            *_block(16, 32),
            *_block(32, 48),
            nn.MaxPool2d(2),
            *_block(48, 64),
            *_block(64, 64),
            nn.AvgPool2d(kernel_size=3, stride=2),
            nn.Flatten(),
        )
        self.embed = nn.Sequential(nn.Linear(64 * 3 * 3, DIGITS_FEATURES), nn.ReLU())
        self.head = nn.Linear(DIGITS_FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """The 64 non-negative numbers before the last layer, float32 [B, 64]."""
        embedded: Tensor = self.embed(self.trunk(images))
        return embedded

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [B, 10]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()
