"""Reference statistics: what generated images are compared with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features import Extractor
from autodiffusion_optuna.evaluation.features.efficientnet import efficientnet_side
from autodiffusion_optuna.evaluation.frechet import Moments, covariance_factor
from autodiffusion_optuna.evaluation.references.cache import remembered
from autodiffusion_optuna.evaluation.references.formats import (
    FORMAT,
    MODES,
    Array,
    Meta,
    ReferenceData,
    Statistics,
    read_reference_data,
)
from autodiffusion_optuna.evaluation.references.images import Images

KEPT_FEATURES = 1000
KEPT_IMAGES, KEPT_BYTES = 16, 2**24
FEW_FEATURES = 100
"""Below so many of the reference's features, a kernel distance is mostly noise."""
BATCH = 100
ROUND_OFF = 1e-20  # of a variance to a squared mean, in float64

OnImages = Callable[[int, int], None]
"""(images embedded so far, images in all)."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Mean and covariance of a dataset's features, and what they were made with.

    ``mu``: float64 [D]. ``sigma``: float64 [D, D]. ``n``: images behind them, None where a file does not say.
    ``features``: float32 [M, D] of some of the images, or None; only the kernel distance needs them.
    ``channels`` and ``size`` (height, width, of the first where they differ): of the images, None where they are not
    known. ``notes``: what was left out of it or assumed when it was read, a line each. ``images``: a few of the images,
    uint8 [up to 16, C, H, W], where it was made from images; they decide no value.
    """

    mu: Tensor
    sigma: Tensor
    n: int | None
    fingerprint: str
    extractor: str
    dataset: str
    features: Tensor | None = None
    channels: int | None = None
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    images: Tensor | None = None

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
    """Reference statistics for ``extractor`` from a file or a folder in any format of ``formats.read_reference_data``.

    Statistics are compared only with features of the same network and resize. In order:

    1. Our own npz: its fingerprint must be the extractor's.
    2. Statistics whose make is known (from ADM's keys, clean-fid's file names, EDM2's and AutoDiffusion's
       pickles, dgm-eval's ``model``) where the extractor and its mode are the same.
    3. Images, in a folder, a zip or an array: they are embedded here. So ADM's npz gives its mu and sigma (of
       the whole dataset) to Inception in mode legacy_tensorflow, and its images (``arr_0``, some thousands)
       to everything else.
    4. Statistics or features of unknown make: for Inception only, and only where the user stated the mode
       (``load_extractor(mode=...)``), which is then taken to be how they were made: legacy_pytorch for
       pytorch-fid, legacy_tensorflow for TTUR, EDM and torch-fidelity.

    StatisticsError for all else.
    """
    data = read_reference_data(path)
    if data.meta is not None:
        return _own(path, data, data.meta, extractor)
    for statistics in data.statistics:
        if statistics.extractor == extractor.name and statistics.mode == _mode(extractor):
            return _foreign(path, statistics, extractor, data.images)
    if data.images is not None:
        return _build_from(path, data.images, extractor)
    return _foreign(path, _as_stated(path, data, extractor), extractor)


def build_reference_from(path: Path, extractor: Extractor, on_images: OnImages | None = None) -> Reference:
    """Reference of the images in a folder, zip, npz or npy; StatisticsError where it holds none.

    ``on_images`` is called after every batch.
    """
    data = read_reference_data(path)
    if data.images is None:
        raise StatisticsError(f"{path}: holds {data.what}, no images; give a folder, zip or array of images")
    return _build_from(path, data.images, extractor, on_images)


def build_reference(images: Tensor, extractor: Extractor, dataset: str) -> Reference:
    """Reference of ``images`` uint8 [N, 1 or 3, H, W]; StatisticsError where they do not fit or N < 2."""
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    return _build(torch.split(images, BATCH), len(images), shape, extractor, dataset)


def save_reference(path: Path, reference: Reference) -> None:
    """Write ``reference`` as an npz that ``load_reference`` reads; a file in its place is replaced whole.

    StatisticsError where the file cannot be written.
    """
    meta = {"version": FORMAT, **{name: getattr(reference, name) for name in Meta.model_fields if name != "version"}}
    arrays = {"mu": reference.mu.cpu().numpy(), "sigma": reference.sigma.cpu().numpy()}
    if reference.features is not None:
        arrays["features"] = reference.features.cpu().numpy()
    if reference.images is not None:
        arrays["images"] = reference.images.cpu().numpy()
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise StatisticsError(f"cannot write {str(path)!r} ({error.strerror}); give another file") from error


def check_images(reference: Reference, shape: tuple[int, int, int]) -> None:
    """StatisticsError where images of ``shape`` (C, H, W) are no match for those behind ``reference``.

    Grey and colour images are never compared. Their sizes may differ, since extractors resize; only
    efficientnet-lite0 looks at images in a size of their own.
    """
    channels, *size = shape
    if reference.channels not in (None, channels):
        grey = ", all of them the same: save them as grey" if _is_grey(reference) else ""
        raise StatisticsError(
            f"the model's images have {channels} channel(s), those of reference {reference.dataset!r} have "
            f"{reference.channels}{grey}; give a reference of images like the model's"
        )
    if reference.extractor == "efficientnet-lite0" and reference.size is not None:
        seen, wanted = efficientnet_side(*size), efficientnet_side(*reference.size)
        if seen != wanted:
            raise StatisticsError(
                f"extractor 'efficientnet-lite0' sees the model's images in {seen} pixels, those of reference "
                f"{reference.dataset!r} in {wanted}; give a reference of images of the model's size"
            )


def log_trace_ratio(generated: Moments, reference: Reference) -> float:
    """log(tr S / tr R) of the moments of features: below 0 where their variety is the smaller.

    A Fréchet distance over few images can prefer images of less variety; this shows it. -inf where all images
    have the same features. StatisticsError for fewer than two images or a reference without variance.
    """
    spread, wanted = float(generated.covariance.trace()), float(reference.sigma.trace())
    if wanted <= 0:
        raise StatisticsError(f"reference {reference.dataset!r} has no variance; build it from more images")
    return math.log(spread / wanted) if spread > 0 else -math.inf


def too_few(n: int, dim: int) -> str | None:
    """A line of warning where ``n`` images do not span ``dim`` features; None where they do."""
    if n >= dim:
        return None
    return (
        f"{n:,} images for {dim:,} features: the distance is far above its limit and can prefer images of less "
        f"variety; compare only at equal counts, and confirm the best with at least {dim:,} images"
    )


def doubts(reference: Reference, shape: tuple[int, int, int], metric: str) -> list[str]:
    """What is doubtful about comparing images of ``shape`` (C, H, W) with ``reference``, a line each.

    ``metric``: "frechet" or "kid".
    """
    few = _few_images(reference) if metric == "frechet" else _few_features(reference)
    lines = [few] if few else []
    name, size = f"reference {reference.dataset!r}", reference.size
    if size is not None and size != shape[1:]:
        distorted = " and of another aspect ratio" if size[0] * shape[2] != size[1] * shape[1] else ""
        lines.append(
            f"{name} has images of {size[1]}x{size[0]}, the model's are {shape[2]}x{shape[1]}{distorted}: the distance "
            "counts what resizing does to them; give images of the model's size, made as its training images were"
        )
    if shape[0] == 3 and _is_grey(reference):
        lines.append(f"{name} seems to have grey images only, saved as colour; the model's are in colour")
    return lines


def _few_images(reference: Reference) -> str | None:
    """Where a file does not say how many there are, the rank of the covariance shows when they are few."""
    dim, n = len(reference.mu), reference.n
    seems = "" if n is not None else "seemingly "
    n = reference.factor.shape[1] + 1 if n is None else n
    if n >= dim:
        return None
    return (
        f"reference {reference.dataset!r} has {seems}{n:,} images for {dim:,} features, which do not span them: the "
        f"distance rests on their chance; give at least {dim:,}, better {10 * dim:,}"
    )


def _few_features(reference: Reference) -> str | None:
    kept = 0 if reference.features is None else len(reference.features)
    if kept >= FEW_FEATURES:
        return None
    return (
        f"reference {reference.dataset!r} has {kept} images for the kernel distance, which is mostly noise below "
        f"{FEW_FEATURES}; give more"
    )


# Building


def _build_from(path: Path, images: Images, extractor: Extractor, on_images: OnImages | None = None) -> Reference:
    """Statistics of the images at ``path``, or what is kept of the same ones."""
    dataset = path.stem
    seen = {(size if extractor.seen is None else extractor.seen(*size)) for size in (images.shape[1:], *images.others)}
    if len(seen) > 1:
        resized = "resizes no images" if extractor.seen is None else "sees them in several sizes"
        raise StatisticsError(f"{images.odd}, and extractor {extractor.name!r} {resized}; give images of one size")

    def build() -> Reference:
        batches = (torch.from_numpy(batch) for batch in images.batches(BATCH))
        return _build(batches, images.total, images.shape, extractor, dataset, on_images)

    if extractor.name.startswith("python:"):  # what its module imports may have changed, and shows nowhere
        reference = build()
    else:
        kept = partial(_kept, extractor=extractor)
        reference = remembered(path, images, _facts(extractor), build, kept, save_reference)
    several = (
        f"reference {dataset!r}: its images have {1 + len(images.others):,} sizes ({images.odd}); the extractor "
        "resizes each to one, whatever its aspect ratio"
    )
    return replace(reference, notes=(*images.notes, *([several] if images.others else [])))


def _facts(extractor: Extractor) -> list[str | int | None]:
    """What decides the statistics of given images."""
    device = extractor.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [FORMAT, extractor.fingerprint, extractor.mode, name]


def _kept(file: Path, extractor: Extractor) -> Reference:
    """A reference that was kept; ``StatisticsError`` where the file is damaged or another one."""
    data = read_reference_data(file)
    if data.meta is None:
        raise StatisticsError(f"{file}: holds {data.what}")
    return _own(file, data, data.meta, extractor)


def _build(
    batches: Iterable[Tensor],
    total: int,
    shape: tuple[int, int, int],
    extractor: Extractor,
    dataset: str,
    on_images: OnImages | None = None,
) -> Reference:
    if total < 2:
        raise StatisticsError(f"reference {dataset!r} has {total} image(s); statistics need at least 2")
    moments = Moments(extractor.dim)
    kept, shown = [], []
    stride, gap = _stride(total), math.ceil(total / KEPT_IMAGES)
    for batch in batches:
        if len(some := batch[-moments.n % gap :: gap]):
            shown.append(_reduced(some, shape))
        features = extractor(batch)
        kept.append(features[-moments.n % stride :: stride].cpu())
        moments.add(features)
        if on_images is not None:
            on_images(moments.n, total)
    assert moments.n == total
    mu, sigma = moments.mean.cpu(), moments.covariance.cpu()
    _check_variance(mu, sigma, f"reference {dataset!r}")
    made = total, extractor.fingerprint, extractor.name, dataset
    return Reference(mu, sigma, *made, torch.cat(kept), shape[0], shape[1:], images=torch.cat(shown))


def _reduced(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A few images on the CPU, all of the size of ``shape`` or of a smaller one where that is large."""
    less = math.ceil(math.sqrt(KEPT_IMAGES * math.prod(shape) / KEPT_BYTES))
    size = max(shape[1] // less, 1), max(shape[2] // less, 1)
    if tuple(images.shape[2:]) == size:
        return images.cpu().clone()
    resized = functional.interpolate(images.cpu().float(), size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _is_grey(reference: Reference) -> bool:
    """Whether a few of the images have three channels that are the same."""
    images = reference.images
    return images is not None and images.shape[1] == 3 and bool((images == images[:, :1]).all())


def _stride(total: int) -> int:
    """Kept features are evenly spaced, so that images sorted by class are kept in proportion."""
    return math.ceil(total / KEPT_FEATURES)


# Reading


def _mode(extractor: Extractor) -> str | None:
    """How Inception's images are resized; None for the others, which have one way."""
    return (extractor.mode or "clean") if extractor.name == "inception" else None


def _own(path: Path, data: ReferenceData, meta: Meta, extractor: Extractor) -> Reference:
    if meta.fingerprint != extractor.fingerprint:
        raise StatisticsError(
            f"{path}: was made with extractor {meta.extractor!r} ({meta.fingerprint}), the study uses "
            f"{extractor.name!r} ({extractor.fingerprint}); use the same extractor, mode and weights, or build the "
            "reference again"
        )
    (statistics,) = data.statistics
    features = None if statistics.features is None else torch.from_numpy(statistics.features)
    mu, sigma = _float64(path, "mu", statistics.mu), _float64(path, "sigma", statistics.sigma)
    images = None if data.shown is None else torch.from_numpy(data.shown)
    facts = meta.model_dump(exclude={"version"})
    return _validated(path, Reference(mu, sigma, features=features, images=images, **facts), extractor)


def _as_stated(path: Path, data: ReferenceData, extractor: Extractor) -> Statistics:
    """The statistics of unknown make, which the extractor's mode speaks for; StatisticsError where it does not."""
    unknown = [part for part in data.statistics if part.extractor is None]
    if not unknown:
        known = data.statistics[0]
        if known.extractor != extractor.name:
            raise StatisticsError(
                f"{path}: holds {data.what}, made with extractor {known.extractor!r}, the study uses "
                f"{extractor.name!r}; use the same extractor, or build the reference from images"
            )
        raise StatisticsError(
            f"{path}: holds {data.what}, made in mode {known.mode}, the study's extractor uses "
            f"{_mode(extractor)}; set the mode to {known.mode}, or build the reference from images"
        )
    if extractor.name != "inception":
        raise StatisticsError(
            f"{path}: holds {data.what}; without a fingerprint they are taken for Inception's, the study uses "
            f"{extractor.name!r}: build the reference from images"
        )
    if extractor.mode is None:
        raise StatisticsError(
            f"{path}: holds {data.what}, which do not say how their images were resized; state it as the mode "
            f"({', '.join(MODES)}): legacy_pytorch for pytorch-fid's, legacy_tensorflow for TTUR's and EDM's"
        )
    return unknown[0]


def _foreign(path: Path, statistics: Statistics, extractor: Extractor, images: Images | None = None) -> Reference:
    """Statistics that others wrote; ``images``: those beside them in the file, some of the dataset's."""
    features = None if statistics.features is None else _float32(path, statistics.features)
    if statistics.mu is not None and statistics.sigma is not None:
        mu, sigma = _float64(path, "mu", statistics.mu), _float64(path, "sigma", statistics.sigma)
    else:
        assert features is not None
        moments = Moments.of(features)
        if moments.n < 2:
            raise StatisticsError(f"{path}: has features of {moments.n} image(s); statistics need at least 2")
        mu, sigma = moments.mean, moments.covariance
    if features is not None:
        features = features[:: _stride(max(len(features), 1))].clone()
    dataset = path.stem.removesuffix("_kid")
    facts = statistics.n, extractor.fingerprint, extractor.name, dataset
    reference = Reference(mu, sigma, *facts, features)
    if images is not None and images.total:
        channels, size = images.shape[0], images.shape[1:]
        some = torch.from_numpy(next(images.batches(KEPT_IMAGES)))
        reference = replace(reference, channels=channels, size=size, notes=images.notes, images=some)
    return _validated(path, reference, extractor)


def _float32(path: Path, features: Array) -> Tensor:
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise StatisticsError(
            f"{path}: features are {features.dtype} {list(features.shape)}; they must be float [N, D]"
        )
    tensor = torch.from_numpy(features.astype(np.float32))
    if not bool(tensor.isfinite().all()):
        raise StatisticsError(f"{path}: holds NaN or infinity; build the reference again")
    return tensor


def _float64(path: Path, key: str, array: Array | None) -> Tensor:
    if array is None or not np.issubdtype(array.dtype, np.floating):
        raise StatisticsError(f"{path}: {key} is missing or no float array; build the reference again")
    return torch.from_numpy(array.astype(np.float64))


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
    _check_variance(mu, sigma, str(path))
    if reference.n is not None and reference.n < 2:
        raise StatisticsError(f"{path}: was made from {reference.n} image(s); statistics need at least 2")
    try:
        _ = reference.factor  # cached: whatever is wrong with it shows before a study is written
    except StatisticsError as error:
        raise StatisticsError(f"{path}: sigma is no covariance ({error}); build it again") from error
    return reference


def _check_variance(mu: Tensor, sigma: Tensor, where: str) -> None:
    if float(sigma.trace()) <= ROUND_OFF * float(mu.square().sum()):
        raise StatisticsError(f"{where}: its images all have the same features; give images that differ")
