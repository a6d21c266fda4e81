"""Images of a folder, a zip or an array, read a batch at a time. No torch."""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.files import START, not_content

Pixels = npt.NDArray[np.uint8]
Read = Callable[[str], IO[bytes]]
"""Opens the file of that name."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
GREY_MODES, COLOUR_MODES = frozenset({"1", "L", "LA"}), frozenset({"RGB", "RGBA", "P", "CMYK", "YCbCr"})
MAX_MEMBER = 8 * 2**30
SUSPICIOUS_SIZE, SUSPICIOUS_RATIO = 2**28, 1000
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


@dataclass(frozen=True, eq=False)
class Images:
    """``total`` images of ``shape`` (C, H, W), C 1 or 3: grey where all of them are, else colour.

    ``batches(size)``: all of them, uint8 [up to size, C, H, W]; StatisticsError at one that is unreadable.
    ``others``: further (H, W), where not all images have that of ``shape``, the first one's; a batch is of one size,
    and all of a size come before the next. ``odd``: an image of another size than the first one's, in words.
    """

    total: int
    shape: tuple[int, int, int]
    batches: Callable[[int], Iterator[Pixels]]
    others: tuple[tuple[int, int], ...] = ()
    odd: str | None = None


def folder_images(folder: Path) -> Images:
    """The png, jpg and webp images below ``folder``, sorted by path; hidden files are left out."""
    names = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    names = sorted((name for name in names if _is_image(name.parts)), key=lambda name: name.parts)
    if not names:
        raise StatisticsError(
            f"{str(folder)!r} holds no png or jpg images, nor webp; give another folder, a zip or an npz file"
        )

    @contextmanager
    def session() -> Iterator[Read]:
        yield read

    def read(name: str) -> IO[bytes]:
        try:
            return (folder / name).open("rb")
        except OSError as error:
            raise StatisticsError(f"{folder / name} cannot be read ({error.strerror})") from error

    return _file_images([str(name) for name in names], session, folder)


def zip_images(path: Path) -> Images:
    """The png, jpg and webp images in a zip, sorted by path; hidden files and ``__MACOSX`` are left out."""
    with _opened(path) as archive:
        infos = [info for info in archive.infolist() if _is_image(PurePosixPath(info.filename).parts)]
        infos = sorted(infos, key=lambda info: PurePosixPath(info.filename).parts)
        if not infos:
            raise StatisticsError(f"{str(path)!r} is a zip without png or jpg images, or webp; give another file")
        for info in infos:
            check_member(path, info, limit=SUSPICIOUS_SIZE)

    @contextmanager
    def session() -> Iterator[Read]:
        with _opened(path) as archive:
            yield lambda name: _unzipped(archive, name, path)

    return _file_images([info.filename for info in infos], session, path)


def array_images(array: npt.NDArray[np.uint8]) -> Images:
    """The images of an array uint8 [N, H, W, C]."""

    def batches(size: int) -> Iterator[Pixels]:
        for start in range(0, len(array), size):
            yield _channels_first(array[start : start + size])

    height, width, channels = array.shape[1:]
    return Images(len(array), (channels, height, width), batches)


def stream_images(opened: Callable[[], IO[bytes]], shape: tuple[int, int, int, int], path: Path) -> Images:
    """The images [N, H, W, C] = ``shape`` of a stream of raw uint8 that ``opened`` starts anew, never held whole."""
    total, height, width, channels = shape
    bytes_each = height * width * channels

    def batches(size: int) -> Iterator[Pixels]:
        with opened() as stream:
            for start in range(0, total, size):
                count = min(size, total - start)
                try:
                    data = stream.read(count * bytes_each)
                except BAD_ZIP as error:
                    raise StatisticsError(f"{path}: its images are damaged ({error}); copy the file again") from error
                if len(data) < count * bytes_each:
                    raise StatisticsError(f"{path}: ends within its images; copy the file again")
                yield _channels_first(np.frombuffer(data, np.uint8).reshape(count, height, width, channels))

    return Images(total, (channels, height, width), batches)


def check_member(path: Path, info: zipfile.ZipInfo, limit: int = MAX_MEMBER) -> None:
    """StatisticsError where a zip's member would unpack to more than ``limit`` bytes or looks like a zip bomb.

    Sizes are those of the zip's headers, beyond which nothing is unpacked.
    """
    ratio = info.file_size / max(info.compress_size, 1)
    bomb = ratio > SUSPICIOUS_RATIO and info.file_size > SUSPICIOUS_SIZE
    if bomb or info.file_size > limit:
        raise StatisticsError(
            f"{path}: member {info.filename!r} claims {info.file_size:,} bytes from {info.compress_size:,}; "
            "it is refused as a zip bomb: write the file without such a member"
        )


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except BAD_ZIP as error:
        raise StatisticsError(f"{str(path)!r} is not a readable zip ({error}); copy the file again") from error


def _unzipped(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    try:
        return io.BytesIO(archive.read(name))
    except BAD_ZIP as error:
        raise StatisticsError(f"{path}: member {name!r} cannot be unpacked ({error}); write the zip again") from error


def _is_image(parts: tuple[str, ...]) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return bool(parts) and not hidden and PurePosixPath(parts[-1]).suffix.lower() in SUFFIXES


def _file_images(names: Sequence[str], session: Callable[[], AbstractContextManager[Read]], root: Path) -> Images:
    """The images of the files ``names``, which a ``session`` reads. Their headers are all read at once."""
    by_size: dict[tuple[int, int], list[str]] = {}
    grey: list[bool] = []
    with session() as read:
        for name in names:
            with read(name) as file, _image(file, root / name) as image:
                grey.append(image.mode in GREY_MODES)
                by_size.setdefault((image.height, image.width), []).append(name)
    mode = "L" if all(grey) else "RGB"

    def batches(size: int) -> Iterator[Pixels]:
        with session() as read:
            for members in by_size.values():
                for start in range(0, len(members), size):
                    images = []
                    for name in members[start : start + size]:
                        with read(name) as file:
                            images.append(_decoded(file, root / name, mode))
                    yield _channels_first(np.stack(images))

    (height, width), *others = by_size
    odd = None
    if others:
        other = by_size[others[0]][0]
        odd = f"{root / other} is {_size(others[0])}, {PurePosixPath(names[0]).name} is {_size((height, width))}"
    return Images(len(names), (1 if mode == "L" else 3, height, width), batches, tuple(others), odd)


@contextmanager
def _image(file: IO[bytes], path: Path) -> Iterator[Image.Image]:
    """An opened image of 8 bits a channel; StatisticsError where it is none, also while it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if image.mode not in GREY_MODES | COLOUR_MODES:
                    raise StatisticsError(f"{path} has {image.mode!r} pixels; images must have 8 bits a channel")
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise StatisticsError(f"{path} claims more pixels than an image has; remove or replace it") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        file.seek(0)
        told = not_content(file.read(START)) or "is not a readable image; remove or replace it"
        raise StatisticsError(f"{path} {told}") from error


def _decoded(file: IO[bytes], path: Path, mode: str) -> Pixels:
    """uint8 [H, W, 1 or 3]."""
    with _image(file, path) as image:
        pixels = np.array(image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _channels_first(images: Pixels) -> Pixels:
    """A fresh, writable array [B, C, H, W] of ``images`` [B, H, W, C]."""
    return np.array(images.transpose(0, 3, 1, 2), order="C", copy=True)


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
