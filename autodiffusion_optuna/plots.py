"""Pictures of samples. Needs numpy and Pillow, never torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from autodiffusion_optuna.errors import ConfigError

CELL = 84
"""Smallest side of one drawn image in pixels; small images are enlarged by a whole factor."""
MARGIN, GAP, FONT_SIZE = 16, 4, 18


def draw_grid(rows: Sequence[tuple[str, NDArray[np.uint8]]], path: Path) -> None:
    """Write labelled rows of images to a PNG or JPEG file.

    ``rows``: (label, uint8 [N, C, H, W]) with C = 1 or 3, all of one shape; a column is one noise.
    Raises ConfigError where the file cannot be written.
    """
    count, _, height, width = rows[0][1].shape
    scale = max(1, CELL // max(height, width))
    cell_w, cell_h = width * scale, height * scale
    font = ImageFont.load_default(size=FONT_SIZE)
    label_w = max(int(font.getlength(label)) for label, _ in rows) + MARGIN
    size = (
        2 * MARGIN + label_w + count * (cell_w + GAP) - GAP,
        2 * MARGIN + len(rows) * (cell_h + GAP) - GAP,
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows):
        top = MARGIN + r * (cell_h + GAP)
        draw.text((MARGIN, top + cell_h // 2), label, fill="black", font=font, anchor="lm")
        for c, image in enumerate(images):
            left = MARGIN + label_w + c * (cell_w + GAP)
            canvas.paste(_enlarge(image, scale), (left, top))
    try:
        canvas.save(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot write picture {str(path)!r}: {error}; give --out FILE.png in a folder that exists"
        ) from None


def _enlarge(image: NDArray[np.uint8], scale: int) -> Image.Image:
    pixels = np.repeat(np.moveaxis(image, 0, -1), 3 // image.shape[0], axis=-1)
    return Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))
