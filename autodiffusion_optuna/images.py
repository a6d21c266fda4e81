"""Pictures of samples. Needs numpy and Pillow, never torch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from autodiffusion_optuna.errors import ConfigError

CELL, LARGEST_CELL = 96, 192
"""Sides of one drawn image in pixels: small images are enlarged about to the first, by a whole factor, large ones
reduced to the second."""
MARGIN, GAP, NAME_SIZE, FONT_SIZE, LEADING = 16, 4, 18, 14, 5
"""Space around and between what is drawn, sizes of letters, and space between lines, in pixels."""
INK, FAINT = "#1b2430", "#667085"
COLUMNS = 16
"""Images side by side; more of them go on below."""
SMALL_CELL, SMALL_GAP, TONES = 80, 2, 128
"""Of ``square_grid``: the largest side of an image in pixels, the space between images, and the colours kept."""
Rows: TypeAlias = Sequence[tuple[str, NDArray[np.uint8]]]
"""(caption, uint8 [N, C, H, W]) with C = 1 or 3, all of one shape; the n-th images of all rows are of one noise.

The first line of a caption is the row's name, those below it are facts.
"""


def draw_grid(rows: Rows, path: Path) -> None:
    """Write captioned rows of images to a PNG or JPEG file (ConfigError where it cannot be written)."""
    try:
        _grid(rows).save(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"cannot write picture {str(path)!r}: {error}; give --out FILE.png in a folder that exists"
        ) from None


def check_picture(path: Path) -> None:
    """ConfigError where ``path`` has no suffix of a picture that ``draw_grid`` can write."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"cannot write picture {str(path)!r}: its suffix is none of a picture; give --out FILE.png")


def grid_png(rows: Rows) -> bytes:
    """PNG file of captioned rows of images."""
    return _png(_grid(rows))


def _grid(rows: Rows) -> Image.Image:
    """Captions on the left, a row of images beside each, one column for each noise."""
    count = len(rows[0][1])
    lines, columns = -(-count // COLUMNS), min(count, COLUMNS)
    cell_w, cell_h = _cell(*rows[0][1].shape[2:])
    captions = [_caption(text) for text, _ in rows]
    label_w = max(caption.width for caption in captions) + MARGIN
    block = max(lines * (cell_h + GAP) - GAP, *(caption.height for caption in captions))
    space = MARGIN if lines > 1 else GAP
    size = (
        2 * MARGIN + label_w + columns * (cell_w + GAP) - GAP,
        2 * MARGIN + len(rows) * (block + space) - space,
    )
    canvas = Image.new("RGB", size, "white")
    for r, (caption, (_, images)) in enumerate(zip(captions, rows, strict=True)):
        top = MARGIN + r * (block + space)
        canvas.paste(caption, (MARGIN, top + max(0, (min(block, cell_h) - caption.height) // 2)))
        for n, image in enumerate(images):
            line, column = divmod(n, COLUMNS)
            place = MARGIN + label_w + column * (cell_w + GAP), top + line * (cell_h + GAP)
            canvas.paste(_scaled(image, (cell_w, cell_h)), place)
    return canvas


def _caption(text: str) -> Image.Image:
    """A caption as a picture of its own size: the name, and smaller below it the facts."""
    fonts = [ImageFont.load_default(size=NAME_SIZE), ImageFont.load_default(size=FONT_SIZE)]
    lines = [(line, fonts[min(n, 1)], (NAME_SIZE, FONT_SIZE)[min(n, 1)]) for n, line in enumerate(text.split("\n"))]
    width = max(math.ceil(font.getlength(line)) for line, font, _ in lines)
    canvas = Image.new("RGB", (width, sum(size + LEADING for _, _, size in lines)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for n, (line, font, size) in enumerate(lines):
        draw.text((0, top + size // 2), line, fill=FAINT if n else INK, font=font, anchor="lm")
        top += size + LEADING
    return canvas


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
    scale = max(1, min(round(smallest / longest), largest // longest))
    return width * scale, height * scale


def _scaled(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    pixels = np.repeat(np.moveaxis(image, 0, -1), 3 // image.shape[0], axis=-1)
    drawn = Image.fromarray(np.ascontiguousarray(pixels))
    return drawn.resize(size, Image.Resampling.NEAREST if size[0] >= drawn.width else Image.Resampling.LANCZOS)
