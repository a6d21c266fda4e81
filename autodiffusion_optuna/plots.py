"""Pictures of samples. Needs numpy and Pillow, never torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from autodiffusion_optuna.errors import ConfigError

CELL, LARGEST_CELL = 84, 192
"""Bounds of the side of one drawn image in pixels: small images are enlarged by a whole factor, large ones reduced."""
MARGIN, GAP, FONT_SIZE = 16, 4, 18
COLUMNS = 16
"""Images side by side; more of them go on below."""


def draw_grid(rows: Sequence[tuple[str, NDArray[np.uint8]]], path: Path) -> None:
    """Write labelled rows of images to a PNG or JPEG file.

    ``rows``: (label, uint8 [N, C, H, W]) with C = 1 or 3, all of one shape; the n-th images of all are of one noise.
    Raises ConfigError where the file cannot be written.
    """
    count = len(rows[0][1])
    lines, columns = -(-count // COLUMNS), min(count, COLUMNS)
    cell_w, cell_h = _cell(*rows[0][1].shape[2:])
    font = ImageFont.load_default(size=FONT_SIZE)
    label_w = max(int(font.getlength(label)) for label, _ in rows) + MARGIN
    block = lines * (cell_h + GAP)
    size = (
        2 * MARGIN + label_w + columns * (cell_w + GAP) - GAP,
        2 * MARGIN + len(rows) * block + (len(rows) - 1) * (MARGIN if lines > 1 else 0) - GAP,
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for r, (label, images) in enumerate(rows):
        top = MARGIN + r * (block + (MARGIN if lines > 1 else 0))
        draw.text((MARGIN, top + cell_h // 2), label, fill="black", font=font, anchor="lm")
        for n, image in enumerate(images):
            line, column = divmod(n, COLUMNS)
            place = MARGIN + label_w + column * (cell_w + GAP), top + line * (cell_h + GAP)
            canvas.paste(_scaled(image, (cell_w, cell_h)), place)
    try:
        canvas.save(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot write picture {str(path)!r}: {error}; give --out FILE.png in a folder that exists"
        ) from None


def _cell(height: int, width: int) -> tuple[int, int]:
    """(width, height) at which images of a size are drawn."""
    longest = max(height, width)
    if longest > LARGEST_CELL:
        return max(1, width * LARGEST_CELL // longest), max(1, height * LARGEST_CELL // longest)
    scale = max(1, CELL // longest)
    return width * scale, height * scale


def _scaled(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    pixels = np.repeat(np.moveaxis(image, 0, -1), 3 // image.shape[0], axis=-1)
    drawn = Image.fromarray(np.ascontiguousarray(pixels))
    return drawn.resize(size, Image.Resampling.NEAREST if size[0] >= drawn.width else Image.Resampling.LANCZOS)
