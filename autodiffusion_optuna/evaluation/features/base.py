"""The extractor itself, and what its kinds share."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autodiffusion_optuna.config import Mode
from autodiffusion_optuna.errors import ConfigError, ModelError, StatisticsError, first_line
from autodiffusion_optuna.evaluation.features.weights import sha256_of
from autodiffusion_optuna.evaluation.tensors import check_numbers

NEEDED = {
    "inception": "a local inception-2015-12-05.pt",
    "inception, legacy_pytorch": "a local pt_inception-2015-12-05-6726825d.pth",
    "clip": "a local ViT-B-32.pt of OpenAI's CLIP",
    "dinov2": "a TorchScript file, or a folder that Dinov2Model.save_pretrained wrote",
    "torchscript": "a TorchScript file of uint8 [B, C, H, W] to float [B, D]",
}
"""Weights that extractors cannot do without."""

CHUNK = 50  # images; bounds the memory of early, large feature maps

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Extractor:
    """What turns images into features, and the name and fingerprint of that measure.

    ``fingerprint``: hex digest of kind, weights, resize and size; compare features only where it is equal.
    ``dim``: features per image, or None where the images decide it (pixels, networks of the user's).
    ``network``: uint8 [B, C, H, W] on ``device`` to float [B, D].
    ``image_shape``: the only (C, H, W) it takes, or None for any.
    ``mode``: how Inception's images are resized, as the user stated it; None where nobody did ("clean" then).
    ``seen``: side in which the network sees images of (H, W), None where that is their own size.
    ``chunk``: images that the network is given at once, None for all.
    """

    name: str
    fingerprint: str
    dim: int | None
    device: torch.device
    network: Network = field(repr=False)
    _: KW_ONLY
    image_shape: tuple[int, int, int] | None = None
    mode: Mode | None = None
    seen: Callable[[int, int], int] | None = field(default=None, repr=False)
    chunk: int | None = None

    @property
    def metric(self) -> Literal["FID", "FD"]:
        """How a Fréchet distance over these features is called; "FID" is Inception through clean-fid."""
        return "FID" if self.name == "inception" else "FD"

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [B, D] of ``images`` uint8 [B, 1 or 3, H, W], on the images' device.

        StatisticsError where the images have another dtype or shape, or the network gives no [B, D].
        """
        dtype = str(images.dtype).removeprefix("torch.")
        given = f"extractor {self.name!r} was given images {dtype} {list(images.shape)}; it takes uint8"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise StatisticsError(f"{given} [B, 1 or 3, H, W]: quantise first")
        if self.image_shape is not None and tuple(images.shape[1:]) != self.image_shape:
            taken = ", ".join(map(str, self.image_shape))
            raise StatisticsError(f"{given} [B, {taken}]: choose an extractor for these images")
        parts = torch.split(images.to(self.device), self.chunk or max(len(images), 1))
        with torch.no_grad(), _exact_arithmetic():
            features = torch.cat([self._run(part) for part in parts])
        return features.to(images.device, torch.float32)

    def _run(self, images: Tensor) -> Tensor:
        features: Any = self.network(images)
        gave = f"a {type(features).__name__}"
        if isinstance(features, Tensor):
            fits = features.ndim == 2 and len(features) == len(images) and self.dim in (None, features.shape[1])
            if fits and features.is_floating_point():
                return features
            gave = f"{features.dtype} {list(features.shape)}"
        raise StatisticsError(
            f"extractor {self.name!r} was given images {list(images.shape)} and gave {gave}; "
            f"it must give a float tensor [{len(images)}, {self.dim or 'D'}]"
        )


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Reference and candidates must meet the same arithmetic on every GPU: no TF32, no autotuned kernels."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = allowed


@dataclass(frozen=True)
class Wanted:
    """What ``load_extractor`` was asked for, and checked."""

    name: str
    device: torch.device
    weights: Path | None
    mode: Mode | None

    def require(self) -> Path:
        """The weights; ConfigError where none were given."""
        if self.weights is None:
            what = NEEDED["inception, legacy_pytorch" if self.mode == "legacy_pytorch" else self.name]
            raise ConfigError(
                f"extractor {self.name!r} was given no weights, and nothing is downloaded; give the path of {what}"
            )
        return self.weights

    def refuse_weights(self) -> None:
        """ConfigError where weights were given."""
        if self.weights is not None:
            raise ConfigError(
                f"extractor {self.name!r} has no weights, {str(self.weights)!r} was given; leave score.weights out "
                "(delete the line)"
            )

    def import_package(self, module: str, command: str, use: str = "") -> Any:
        """An optional package; ConfigError with the command that installs it where it does not import."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(module)
        except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch raises RuntimeError
            needs = f"extractor {self.name!r}{use} needs {module} ({first_line(error)})"
            raise ConfigError(f"{needs}; install it: {command}") from error

    @contextmanager
    def reading(self, weights: Path, fault: str, advice: str) -> Iterator[None]:
        """Turns whatever is raised in the block into one ModelError; torch raises many kinds for unfit weights."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit is deprecated, and torchvision's arguments have new names
                yield
        except Exception as error:
            reason = first_line(error)
            if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
                reason = "it is no pickle of plain tensors"  # torch's own line advises to run what it asks for
            raise ModelError(f"extractor {self.name!r}: {str(weights)!r} {fault} ({reason}); {advice}") from error

    def guard(self, network: Network) -> Network:
        """``network``, with whatever it raises as one StatisticsError: a user's can raise anything."""

        def run(images: Tensor) -> Tensor:
            try:
                return network(images)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                given = f"extractor {self.name!r} was given images {list(images.shape)}"
                last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise StatisticsError(f"{given} and failed ({last}); it must take such images") from error

        return run

    def extractor(
        self,
        network: Network,
        dim: int | None,
        weights: Path | str | None,
        resize: str,
        size: int | None,
        seen: Callable[[int, int], int] | None = None,
    ) -> Extractor:
        """The extractor of ``network``, a few images at a time. ``weights``: their file or hash.

        ``size``: side of the images that the network is given; ``seen``, where it depends on the images.
        """
        digest = sha256_of(weights) if isinstance(weights, Path) else weights
        return Extractor(
            self.name,
            fingerprint(self.name, digest, resize, size),
            dim,
            self.device,
            network,
            mode=self.mode if self.name == "inception" else None,
            seen=seen or (None if size is None else lambda height, width: size),
            chunk=CHUNK,
        )


def fingerprint(kind: str, weights: str | None, resize: str, size: int | None) -> str:
    """16 hex digits that change with whatever changes features: kind, hash of the weights, resize, size."""
    facts = {"kind": kind, "weights": weights, "resize": resize, "size": size}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check_floats(stored: Mapping[str, Tensor], path: Path) -> None:
    """``ModelError`` where a weight does not hold floating-point numbers; counters of batches need not."""
    check_numbers(stored, (key for key in stored if not key.endswith("num_batches_tracked")), path)


def resize_clean(images: Tensor, size: int = 299) -> Tensor:
    """clean-fid's "clean" resize: uint8 [B, C, H, W] to float32 [B, C, size, size] in 0..255, not rounded.

    Bicubic with antialiasing per channel (a = -0.5), then clipped, where the images are; within 3e-3 of PIL.
    Source: arXiv 2104.11222, section 3; clean-fid 0.1.35, ``cleanfid.resize``.
    """
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255)
