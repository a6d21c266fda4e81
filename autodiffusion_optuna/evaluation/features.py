"""Feature extractors: uint8 images to vectors whose distribution is compared."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError, ModelError, StatisticsError, choose_from
from autodiffusion_optuna.evaluation.digits_net import FEATURES, load_digits_net

DIGITS_WEIGHTS = Path(__file__).parent.parent / "assets" / "digits" / "extractor.safetensors"
MAX_PIXELS = 4096
INCEPTION_SIZE = 299
INCEPTION_FEATURES = 2048
INCEPTION_BATCH = 50  # bounds the memory of its early, large feature maps

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Extractor:
    """What turns images into features, and the name and fingerprint of that measure.

    ``fingerprint``: hex digest of kind, weights, resize and size; compare features only where it is equal.
    ``dim``: features per image, or None where the images decide it (pixels).
    ``metric``: how a Fréchet distance over these features is called; "FID" is Inception through clean-fid.
    ``image_shape``: the only (C, H, W) it takes, or None for any.
    ``network``: uint8 [B, C, H, W] on ``device`` to float32 [B, D].
    """

    name: str
    fingerprint: str
    dim: int | None
    metric: Literal["FID", "FD"]
    device: torch.device
    image_shape: tuple[int, int, int] | None = None
    network: Network = field(kw_only=True, repr=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [B, D] of ``images`` uint8 [B, 1 or 3, H, W], on the images' device.

        StatisticsError where the images have another dtype or shape.
        """
        self._check(images)
        # Reference and candidates must meet the same arithmetic on every GPU: no TF32, no autotuned kernels.
        exact = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
        with torch.no_grad(), torch.backends.cudnn.flags(**exact):
            features = self.network(images.to(self.device))
        return features.to(images.device)

    def _check(self, images: Tensor) -> None:
        given = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        told = f"extractor {self.name!r} was given images {given}; it takes uint8"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise StatisticsError(f"{told} [B, 1 or 3, H, W]: quantise first")
        if self.image_shape is not None and tuple(images.shape[1:]) != self.image_shape:
            taken = ", ".join(map(str, self.image_shape))
            raise StatisticsError(f"{told} [B, {taken}]: choose an extractor for these images")


def resize_clean(images: Tensor, size: int = INCEPTION_SIZE) -> Tensor:
    """clean-fid's "clean" resize: uint8 [B, C, H, W] to float32 [B, C, size, size] in 0..255, not rounded.

    Bicubic with antialiasing per channel (a = -0.5), then clipped, where the images are; within 3e-3 of PIL.
    Source: arXiv 2104.11222, section 3; clean-fid 0.1.35, ``cleanfid.resize``.
    """
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255)


def load_extractor(
    name: str, device: torch.device | str, weights: Path | None = None, trust: bool = False
) -> Extractor:
    """The extractor called ``name`` on ``device``.

    ``weights``: a local file, for the extractors that take one; nothing is ever downloaded.
    ``trust``: allow weights that are code (TorchScript).
    ConfigError for an unknown name, for weights missing or not taken, and for missing trust; ModelError for
    unreadable weights.
    """
    if name not in EXTRACTORS:
        raise ConfigError(choose_from("extractor", name, EXTRACTORS))
    if weights is not None and not weights.is_file():
        raise ConfigError(f"extractor {name!r}: {str(weights)!r} is not a file; give the path of local weights")
    if name in CODE_WEIGHTS and weights is not None and not trust:
        raise ConfigError(
            f"extractor {name!r}: {str(weights)!r} is TorchScript, which is code; "
            "pass --trust if you know where it came from"
        )
    return EXTRACTORS[name](torch.device(device), weights)


def fingerprint(kind: str, weights: Path | None, resize: str, size: int | None) -> str:
    """16 hex digits that change with whatever changes features: kind, bytes of the weights, resize, size."""
    facts = {
        "kind": kind,
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights else None,
        "resize": resize,
        "size": size,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _load_digits(device: torch.device, weights: Path | None) -> Extractor:
    path = weights or DIGITS_WEIGHTS
    try:
        net = load_digits_net(load_file(path)).to(device)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ModelError(
            f"extractor 'digits': {str(path)!r} does not hold its network ({_first_line(error)}); "
            "leave the weights out to use the bundled ones"
        ) from error
    return Extractor(
        name="digits",
        fingerprint=fingerprint("digits", path, resize="none", size=28),
        dim=FEATURES,
        metric="FD",
        device=device,
        image_shape=(1, 28, 28),
        network=lambda images: net.features(images.float() / 255),
    )


def _load_pixels(device: torch.device, weights: Path | None) -> Extractor:
    if weights is not None:
        raise ConfigError(f"extractor 'pixels' has no weights, {str(weights)!r} was given; leave them out")
    return Extractor(
        name="pixels",
        fingerprint=fingerprint("pixels", None, resize="none", size=None),
        dim=None,
        metric="FD",
        device=device,
        network=_flat_pixels,
    )


def _flat_pixels(images: Tensor) -> Tensor:
    """Pixels in 0..255 as float32 [B, C * H * W]; StatisticsError above 4,096 of them."""
    pixels = images[0].numel() if len(images) else 0
    if pixels > MAX_PIXELS:
        raise StatisticsError(
            f"extractor 'pixels' was given images of {pixels} values; it takes at most {MAX_PIXELS}: "
            "choose another extractor for images of this size"
        )
    return images.flatten(1).float()


def _load_inception(device: torch.device, weights: Path | None) -> Extractor:
    if weights is None:
        raise ConfigError(
            "extractor 'inception' was given no weights, and nothing is downloaded; "
            "give the path of a local inception-2015-12-05.pt"
        )
    net = _inception(weights, device)

    def network(images: Tensor) -> Tensor:
        # Resized before it is repeated: a grey image costs one channel.
        batches = torch.split(images, INCEPTION_BATCH)
        return torch.cat([net(resize_clean(batch).expand(-1, 3, -1, -1)) for batch in batches]).float()

    return Extractor(
        name="inception",
        fingerprint=fingerprint("inception", weights, resize="clean", size=INCEPTION_SIZE),
        dim=INCEPTION_FEATURES,
        metric="FID",
        device=device,
        network=network,
    )


def _inception(weights: Path, device: torch.device) -> torch.nn.Module:
    """clean-fid's wrapper around the TorchScript file: float32 [B, 3, 299, 299] in 0..255 to [B, 2048]."""
    try:
        # This module of clean-fid needs no torchvision, which the package's others import.
        from cleanfid.inception_torchscript import InceptionV3W
    except ImportError as error:
        raise ConfigError(
            f"extractor 'inception' needs clean-fid ({_first_line(error)}); install it: pip install clean-fid"
        ) from error
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; clean-fid 0.1.35 has nothing else
        # clean-fid takes a folder and its own file name.
        shutil.copyfile(weights, Path(folder) / "inception-2015-12-05.pt")
        try:
            net: torch.nn.Module = InceptionV3W(folder, download=False).to(device).eval()
        except (RuntimeError, AttributeError) as error:
            raise ModelError(
                f"extractor 'inception': {str(weights)!r} is not the TorchScript Inception of clean-fid "
                f"({_first_line(error)}); give a complete inception-2015-12-05.pt"
            ) from error
    return net


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


EXTRACTORS: dict[str, Callable[[torch.device, Path | None], Extractor]] = {
    "digits": _load_digits,
    "pixels": _load_pixels,
    "inception": _load_inception,
}
CODE_WEIGHTS = frozenset({"inception"})
