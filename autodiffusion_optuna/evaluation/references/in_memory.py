"""Images of a reference that are in memory: an array, a tensor, or a list of PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.references.images import COLOUR_MODES, GREY_MODES

WANTED = "give a folder, a file, an array uint8 [N, H, W, C] or [N, C, H, W] with C = 1 or 3, or a list of PIL images"


def images_of(given: Any) -> Tensor:
    """uint8 [N, 1 or 3, H, W] of an array or tensor uint8 [N, H, W, C], [N, C, H, W] or [N, H, W], or of PIL images.

    PIL images are grey where all of them are. ``StatisticsError`` for anything else, for images of several sizes, and
    where both the second and the last size could be the channels.
    """
    if isinstance(given, Sequence) and given and all(isinstance(image, Image.Image) for image in given):
        return _of_pil(given)
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
    if not isinstance(array, np.ndarray):
        raise StatisticsError(f"images are a {type(given).__name__}; {WANTED}")
    shown = f"images are an array {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        raise StatisticsError(f"{shown}, pixels must be uint8 from 0 to 255; {WANTED}")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise StatisticsError(f"{shown}; {WANTED}")
    first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
    if first == last:
        unclear = "of which either the second or the last size could be the channels" if first else "without channels"
        raise StatisticsError(f"{shown}, {unclear}; {WANTED}")
    return torch.from_numpy(np.array(array if first else array.transpose(0, 3, 1, 2), order="C", copy=True))


def _of_pil(images: Sequence[Image.Image]) -> Tensor:
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise StatisticsError(f"images are of {len(sizes)} sizes, such as {sizes[0]} and {sizes[1]}; give one size")
    for image in images:
        if image.mode not in GREY_MODES | COLOUR_MODES:
            raise StatisticsError(f"an image has {image.mode!r} pixels; give grey or RGB images of 8 bits a channel")
    mode = "L" if all(image.mode in GREY_MODES for image in images) else "RGB"
    pixels = np.stack([np.array(image.convert(mode)) for image in images])
    return images_of(pixels[..., None] if mode == "L" else pixels)
