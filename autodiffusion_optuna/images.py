"""Pictures of samples. Needs numpy and Pillow, never torch."""

from __future__ import annotations

import io
import math
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
SMALL_CELL, SMALL_GAP, TONES = 80, 2, 128
"""Of ``square_grid``: the largest side of an image in pixels, the space between images, and the colours kept."""


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


def square_grid(images: NDArray[np.uint8], most: int = 16) -> bytes:
    """PNG file of up to ``most`` images in a near-square grid, tens of kB.

    ``images``: uint8 [N, C, H, W] with C = 1 or 3.
    """
    shown = images[:most]
    columns = math.isqrt(len(shown) - 1) + 1
    lines = -(-len(shown) // columns)
    cell_w, cell_h = _cell(shown.shape[2], shown.shape[3], smallest=SMALL_CELL, largest=SMALL_CELL)
    step_w, step_h = cell_w + SMALL_GAP, cell_h + SMALL_GAP
    canvas = Image.new("RGB", (columns * step_w - SMALL_GAP, lines * step_h - SMALL_GAP), "white")
    for n, image in enumerate(shown):
        line, column = divmod(n, columns)
        canvas.paste(_scaled(image, (cell_w, cell_h)), (column * step_w, line * step_h))
    drawn = canvas.convert("L") if shown.shape[1] == 1 else canvas.quantize(TONES)
    return _png(drawn)


def picture(image: NDArray[np.uint8]) -> bytes:
    """PNG file of one image, uint8 [C, H, W] with C = 1 or 3; a large one is reduced to ``LARGEST_CELL``."""
    drawn = _scaled(image, _cell(image.shape[1], image.shape[2], smallest=1))
    return _png(drawn.convert("L") if image.shape[0] == 1 else drawn)


def _png(drawn: Image.Image) -> bytes:
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return file.getvalue()


def _cell(height: int, width: int, smallest: int = CELL, largest: int = LARGEST_CELL) -> tuple[int, int]:
    """(width, height) at which images of a size are drawn."""
    longest = max(height, width)
    if longest > largest:
        return max(1, width * largest // longest), max(1, height * largest // longest)
    scale = max(1, smallest // longest)
    return width * scale, height * scale


def _scaled(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    pixels = np.repeat(np.moveaxis(image, 0, -1), 3 // image.shape[0], axis=-1)
    drawn = Image.fromarray(np.ascontiguousarray(pixels))
    return drawn.resize(size, Image.Resampling.NEAREST if size[0] >= drawn.width else Image.Resampling.LANCZOS)
