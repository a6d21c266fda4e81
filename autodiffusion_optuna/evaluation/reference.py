"""Reference statistics: what generated images are compared with."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features import Extractor
from autodiffusion_optuna.evaluation.frechet import Moments, covariance_factor

FORMAT = 1
KEPT_FEATURES = 1000
BATCH = 100
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
GREY_MODES, COLOUR_MODES = frozenset({"1", "L", "LA"}), frozenset({"RGB", "RGBA", "P", "CMYK", "YCbCr"})


@dataclass(frozen=True, eq=False)
class Reference:
    """Mean and covariance of a dataset's features, and what they were made with.

    ``mu``: float64 [D]. ``sigma``: float64 [D, D]. ``n``: images behind them, None where a file does not say.
    ``features``: float32 [M, D] of some of the images, or None; only the kernel distance needs them.
    """

    mu: Tensor
    sigma: Tensor
    n: int | None
    fingerprint: str
    extractor: str
    dataset: str
    features: Tensor | None = None

    @cached_property
    def factor(self) -> Tensor:
        """L with L L^T = sigma, float64 [D, r], computed at first use."""
        return covariance_factor(self.sigma)

    @property
    def digest(self) -> str:
        """Short hash of the statistics and the extractor they belong to."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for part in (self.mu, self.sigma, self.features):
            if part is not None:
                digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_reference(path: Path, extractor: Extractor) -> Reference:
    """Reference statistics for ``extractor`` from a file or a folder.

    Our own npz; an npz with ``mu`` and ``sigma`` only (clean-fid, pytorch-fid, ADM), which for want of a
    fingerprint only the Inception extractor takes, and whose resize is the user's to know; an npz with images
    ``arr_0`` uint8 [N, H, W, C]; or a folder of png and jpg images of one size. StatisticsError for all else.
    """
    if path.is_dir():
        return _from_folder(path, extractor)
    arrays = _read_npz(path)
    if "meta" in arrays:
        return _own(path, arrays, extractor)
    if {"mu", "sigma"} <= arrays.keys() and extractor.name == "inception":
        reference = Reference(*_mu_sigma(path, arrays), None, extractor.fingerprint, extractor.name, dataset=path.stem)
        return _validated(path, reference, extractor)
    if "arr_0" in arrays:
        return build_reference(_nhwc(path, arrays["arr_0"]), extractor, path.stem)
    if {"mu", "sigma"} <= arrays.keys():
        raise StatisticsError(
            f"{path}: mu and sigma without a fingerprint are taken for Inception's, the study uses "
            f"{extractor.name!r}; build the reference from images"
        )
    raise StatisticsError(f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}; it needs mu and sigma, or arr_0")


def build_reference(images: Tensor, extractor: Extractor, dataset: str) -> Reference:
    """Reference of ``images`` uint8 [N, 1 or 3, H, W]; StatisticsError where they do not fit or N < 2."""
    return _build(torch.split(images, BATCH), len(images), extractor, dataset)


def save_reference(path: Path, reference: Reference) -> None:
    """Write ``reference`` as an npz that ``load_reference`` reads; a file in its place is replaced whole."""
    meta = {
        "version": FORMAT,
        "extractor": reference.extractor,
        "fingerprint": reference.fingerprint,
        "n": reference.n,
        "dataset": reference.dataset,
    }
    arrays = {"mu": reference.mu.cpu().numpy(), "sigma": reference.sigma.cpu().numpy()}
    if reference.features is not None:
        arrays["features"] = reference.features.cpu().numpy()
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)
    unfinished.replace(path)


def _build(batches: Iterable[Tensor], total: int, extractor: Extractor, dataset: str) -> Reference:
    if total < 2:
        raise StatisticsError(f"reference {dataset!r} has {total} image(s); statistics need at least 2")
    moments = Moments(extractor.dim)
    kept: list[Tensor] = []
    # Evenly spaced, so that images sorted by class are kept in proportion.
    stride = math.ceil(total / KEPT_FEATURES)
    for batch in batches:
        features = extractor(batch)
        kept.append(features[-moments.n % stride :: stride].cpu())
        moments.add(features)
    assert moments.n == total
    return Reference(
        mu=moments.mean.cpu(),
        sigma=moments.covariance.cpu(),
        n=total,
        fingerprint=extractor.fingerprint,
        extractor=extractor.name,
        dataset=dataset,
        features=torch.cat(kept),
    )


def _read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    advice = "give an npz file or a folder of images"
    if not path.exists():
        raise StatisticsError(f"reference {str(path)!r} does not exist; {advice}")
    try:
        with path.open("rb") as file:  # numpy leaves a file of its own open where it is not a zip
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one bare array")
            return {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, OSError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StatisticsError(f"reference {str(path)!r} is not an npz of plain arrays ({reason}); {advice}") from error


def _own(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], extractor: Extractor) -> Reference:
    try:
        meta = json.loads(str(arrays["meta"]))
        version, name, digest = int(meta["version"]), str(meta["extractor"]), str(meta["fingerprint"])
        n, dataset = None if meta["n"] is None else int(meta["n"]), str(meta["dataset"])
    except (ValueError, KeyError, TypeError) as error:
        raise StatisticsError(f"{path}: its meta is damaged ({error}); build the reference again") from error
    if version != FORMAT:
        raise StatisticsError(f"{path}: has format {version}, this is for {FORMAT}; build the reference again")
    if digest != extractor.fingerprint:
        raise StatisticsError(
            f"{path}: was made with extractor {name!r} ({digest}), the study uses {extractor.name!r} "
            f"({extractor.fingerprint}); use the same extractor and weights, or build the reference again"
        )
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    reference = Reference(*_mu_sigma(path, arrays), n, digest, name, dataset, features)
    return _validated(path, reference, extractor)


def _mu_sigma(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor]:
    for key in ("mu", "sigma"):
        if key not in arrays or not np.issubdtype(arrays[key].dtype, np.floating):
            raise StatisticsError(f"{path}: {key} is missing or no float array; build the reference again")
    mu, sigma = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
    return mu, sigma


def _validated(path: Path, reference: Reference, extractor: Extractor) -> Reference:
    mu, sigma, features = reference.mu, reference.sigma, reference.features
    shapes = f"mu {list(mu.shape)} and sigma {list(sigma.shape)}"
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise StatisticsError(f"{path}: holds {shapes}; they must be [D] and [D, D]")
    if extractor.dim is not None and len(mu) != extractor.dim:
        raise StatisticsError(f"{path}: holds {shapes}; extractor {extractor.name!r} gives {extractor.dim} numbers")
    if features is not None and (features.dtype != torch.float32 or features.shape[1:] != mu.shape):
        raise StatisticsError(f"{path}: features must be float32 [M, {len(mu)}]; build the reference again")
    parts = [mu, sigma] if features is None else [mu, sigma, features]
    if not all(bool(part.isfinite().all()) for part in parts):
        raise StatisticsError(f"{path}: holds NaN or infinity; build the reference again")
    lopsided = float((sigma - sigma.T).abs().max()) > 1e-6 * float(sigma.abs().max())
    if lopsided or bool((sigma.diag() < 0).any()):
        raise StatisticsError(f"{path}: sigma is no covariance (symmetric, variances >= 0); build it again")
    if reference.n is not None and reference.n < 2:
        raise StatisticsError(f"{path}: was made from {reference.n} image(s); statistics need at least 2")
    return reference


def _nhwc(path: Path, images: np.ndarray[Any, Any]) -> Tensor:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise StatisticsError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}; images are uint8 [N, H, W, 1 or 3]"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _from_folder(folder: Path, extractor: Extractor) -> Reference:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise StatisticsError(f"{str(folder)!r} holds no png or jpg images; give another folder or an npz file")
    return _build(_image_batches(files), len(files), extractor, folder.name)


def _image_batches(files: list[Path]) -> Iterator[Tensor]:
    """uint8 [up to 100, C, H, W] of image files, all of the first one's C, H and W."""
    first = _read_image(files[0])
    for start in range(0, len(files), BATCH):
        images = [_read_image(file) for file in files[start : start + BATCH]]
        for file, image in zip(files[start:], images, strict=False):
            if image.shape != first.shape:
                raise StatisticsError(
                    f"{file} is {_size(image)}, {files[0].name} is {_size(first)}; give images of one size"
                )
        yield torch.stack(images)


def _size(image: Tensor) -> str:
    channels, height, width = image.shape
    return f"{width}x{height} {'grey' if channels == 1 else 'colour'}"


def _read_image(file: Path) -> Tensor:
    """uint8 [1 or 3, H, W]."""
    try:
        with Image.open(file) as image:
            if image.mode not in GREY_MODES | COLOUR_MODES:
                raise StatisticsError(f"{file} has {image.mode!r} pixels; images must have 8 bits a channel")
            pixels = np.array(image.convert("L" if image.mode in GREY_MODES else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise StatisticsError(f"{file} is not a readable image; remove or replace it") from error
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
