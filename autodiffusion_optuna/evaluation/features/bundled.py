"""Extractors that need no weights from outside: the bundled networks, and the pixels themselves."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features.base import Extractor, Wanted, check_floats, fingerprint
from autodiffusion_optuna.evaluation.features.weights import sha256_of

ASSETS = Path(__file__).parent.parent.parent / "assets"
DIGITS_WEIGHTS = ASSETS / "digits" / "extractor.safetensors"
FACES_WEIGHTS = ASSETS / "faces" / "extractor.safetensors"
DIGITS_FEATURES = 64
FACES_FEATURES = 96
FACES_ATTRIBUTES = {
    "hair": 8,
    "skin": 3,
    "hair_colour": 13,
    "mouth": 8,
    "eyes": 5,
    "shirt": 3,
    "glasses": 3,
    "facial_hair": 3,
    "nose": 3,
    "background": 5,
}
"""What the faces differ in, and in how many ways each."""
MAX_PIXELS = 4096


def load_digits(wanted: Wanted) -> Extractor:
    """64 features of 28x28 grey images."""
    return _load(wanted, DigitsNet(), DIGITS_WEIGHTS, DIGITS_FEATURES, (1, 28, 28))


def load_faces(wanted: Wanted) -> Extractor:
    """96 features of 32x32 colour images."""
    return _load(wanted, FacesNet(), FACES_WEIGHTS, FACES_FEATURES, (3, 32, 32))


def _load(
    wanted: Wanted, net: DigitsNet | FacesNet, bundled: Path, features: int, image_shape: tuple[int, int, int]
) -> Extractor:
    path = wanted.weights or bundled
    with wanted.reading(path, "does not hold its network", "leave the weights out to use the bundled ones"):
        stored = load_file(path)
        check_floats(stored, path)
        net.load_state_dict(stored)
    net = net.eval().requires_grad_(False).to(wanted.device)
    return Extractor(
        wanted.name,
        fingerprint(wanted.name, sha256_of(path), resize="none", size=image_shape[-1]),
        features,
        wanted.device,
        lambda images: net.features(images.float() / 255),
        image_shape=image_shape,
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


class FacesNet(nn.Module):
    """Logits of ``images`` float32 [B, 3, 32, 32] in [0, 1]: a small classifier of the attributes of cartoon faces.

    A stand-in for Inception. Its features tell hair, eyes, mouth, colours and the like apart, so a Fréchet distance
    over them rises when a face loses a part, takes a colour that none has, or keeps noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(3, 24),
            nn.MaxPool2d(2),
            *_block(24, 48),
            *_block(48, 64),
            nn.MaxPool2d(2),
            *_block(64, 96),
            *_block(96, 96),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.embed = nn.Sequential(nn.Linear(96 * 4 * 4, FACES_FEATURES), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FACES_FEATURES, n) for name, n in FACES_ATTRIBUTES.items()})

    def features(self, images: Tensor) -> Tensor:
        """The 96 non-negative numbers before the last layers, float32 [B, 96]."""
        embedded: Tensor = self.embed(self.trunk(images))
        return embedded

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits float32 [B, classes] by attribute."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()
