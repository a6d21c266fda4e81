"""Images of a folder, a zip or an array, read a batch at a time. No torch."""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.files import START, not_content

Pixels = npt.NDArray[np.uint8]
Read = Callable[[str], IO[bytes]]
"""Opens the file of that name."""

FORMATS = ("bmp", "jpeg", "jpg", "npy", "pgm", "png", "ppm", "tif", "tiff", "webp")
"""Suffixes of images, in any case of letters: those that clean-fid 0.1.35 reads (``cleanfid.utils.EXTENSIONS``)."""
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"})
JUNK = (".DS_Store", "._", "Thumbs.db", "desktop.ini", "__MACOSX")
"""What systems leave in folders and zips on their own; nobody misses it."""
NAMED = 3
ORIENTATION = 0x0112
MAX_MEMBER = 8 * 2**30
SUSPICIOUS_SIZE, SUSPICIOUS_RATIO = 2**28, 1000
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


@dataclass(frozen=True, eq=False)
class Images:
    """``total`` images of ``shape`` (C, H, W), C 1 or 3: grey where all of them are, else colour.

    ``batches(size)``: all of them, uint8 [up to size, C, H, W]; StatisticsError at one that is unreadable.
    ``others``: further (H, W), where not all images have that of ``shape``, the first one's; a batch is of one size,
    and all of a size come before the next. ``odd``: an image of another size than the first one's, in words.
    ``notes``: what was left out or is not read as it is, a line each. ``names``: of the files, in the order in which
    they are read, where each holds one image.
    """

    total: int
    shape: tuple[int, int, int]
    batches: Callable[[int], Iterator[Pixels]]
    others: tuple[tuple[int, int], ...] = ()
    odd: str | None = None
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Header:
    """Of one image: its size (height, width), whether it is grey, and what is not read as it is, in words."""

    size: tuple[int, int]
    grey: bool
    remarks: tuple[str, ...] = ()


def folder_images(folder: Path) -> Images:
    """The images of ``FORMATS`` below ``folder``, sorted by path; links are followed, hidden files are left out."""
    found: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        found += [(Path(place) / file).relative_to(folder).parts for file in files]

    def read(name: str) -> IO[bytes]:
        try:
            return (folder / name).open("rb")
        except OSError as error:
            raise StatisticsError(f"{folder / name} cannot be read ({error.strerror})") from error

    return _file_images({parts: str(Path(*parts)) for parts in found}, lambda: nullcontext(read), folder)


def zip_images(path: Path) -> Images:
    """The images of ``FORMATS`` in a zip, sorted by path; hidden files and ``__MACOSX`` are left out."""
    files = {PurePosixPath(info.filename).parts: info for info in zip_members(path)}
    for parts, info in files.items():
        if _is_image(parts):
            _check_member(path, info, SUSPICIOUS_SIZE)

    @contextmanager
    def session() -> Iterator[Read]:
        with zipfile.ZipFile(path) as archive:
            yield lambda name: _unzipped(archive, name, path)

    return _file_images({parts: info.filename for parts, info in files.items()}, session, path)


def array_images(array: npt.NDArray[np.uint8]) -> Images:
    """The images of an array uint8 [N, H, W, C]."""

    def batches(size: int) -> Iterator[Pixels]:
        for start in range(0, len(array), size):
            yield _channels_first(array[start : start + size])

    height, width, channels = array.shape[1:]
    return Images(len(array), (channels, height, width), batches)


def stream_images(opened: Callable[[], IO[bytes]], shape: tuple[int, ...], path: Path) -> Images:
    """The images [N, H, W, C] = ``shape`` of a raw uint8 stream, read from its start each time and never held whole."""
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


class NpyHeader(NamedTuple):
    """Of an array in numpy's format."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


def npy_header(stream: IO[bytes]) -> NpyHeader:
    """The header of a npy stream, which then stands at its data; ValueError where it has none."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return NpyHeader(*np.lib.format.read_array_header_1_0(stream))
    if version == (2, 0):
        return NpyHeader(*np.lib.format.read_array_header_2_0(stream))
    raise ValueError(f"array format {version[0]}.{version[1]}")


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """All files of a zip; StatisticsError where one claims to be too large to be unpacked, BAD_ZIP for no zip."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        _check_member(path, info, MAX_MEMBER)
    return [info for info in infos if not info.is_dir()]


def _check_member(path: Path, info: zipfile.ZipInfo, limit: int) -> None:
    """Sizes are those of the zip's headers, beyond which nothing is unpacked."""
    ratio = info.file_size / max(info.compress_size, 1)
    bomb = ratio > SUSPICIOUS_RATIO and info.file_size > SUSPICIOUS_SIZE
    if bomb or info.file_size > limit:
        raise StatisticsError(
            f"{path}: member {info.filename!r} claims {info.file_size:,} bytes from {info.compress_size:,}; "
            "it is refused as a zip bomb: write the file without such a member"
        )


def _unzipped(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    try:
        return io.BytesIO(archive.read(name))
    except BAD_ZIP as error:
        raise StatisticsError(f"{path}: member {name!r} cannot be unpacked ({error}); write the zip again") from error


def _is_image(parts: tuple[str, ...]) -> bool:
    return _has_format(parts) and not any(part.startswith((".", "__MACOSX")) for part in parts)


def _is_junk(parts: tuple[str, ...]) -> bool:
    """Whether a file is of the system's own making, or hidden and no image."""
    hidden = any(part.startswith(".") for part in parts)
    return any(part.startswith(JUNK) for part in parts) or (hidden and not _has_format(parts))


def _has_format(parts: tuple[str, ...]) -> bool:
    return PurePosixPath(*parts).suffix.lower()[1:] in FORMATS


def _file_images(
    files: Mapping[tuple[str, ...], str], session: Callable[[], AbstractContextManager[Read]], root: Path
) -> Images:
    """The images among ``files``, names by their parts, which a ``session`` reads. Their headers are all read at once.

    StatisticsError where there is none.
    """
    left_out = [files[parts] for parts in files if not _is_image(parts) and not _is_junk(parts)]
    headers: dict[str, _Header] = {}
    with session() as read:
        for name in [files[parts] for parts in sorted(files) if _is_image(parts)]:
            with read(name) as file:
                header = _npy_header(file, root / name) if _is_npy(name) else _header(file, root / name)
            if header is None:
                left_out.append(name)
            else:
                headers[name] = header
    if not headers:
        raise StatisticsError(
            f"{str(root)!r} holds no images ({', '.join(FORMATS)}); give another folder, a zip or an npz file"
        )
    by_size: dict[tuple[int, int], list[str]] = {}
    for name, header in headers.items():
        by_size.setdefault(header.size, []).append(name)
    mode = "L" if all(header.grey for header in headers.values()) else "RGB"

    def batches(size: int) -> Iterator[Pixels]:
        with session() as read:
            for members in by_size.values():
                for start in range(0, len(members), size):
                    images = []
                    for name in members[start : start + size]:
                        with read(name) as file:
                            images.append(_decoded(file, root / name, mode))
                    yield _channels_first(np.stack(images))

    first, *others = by_size
    odd = None
    if others:
        name, other = PurePosixPath(by_size[first][0]).name, root / by_size[others[0]][0]
        odd = f"{other} is {_size(others[0])}, {name} is {_size(first)}"
    shape = (1 if mode == "L" else 3, *first)
    names = tuple(name for members in by_size.values() for name in members)
    return Images(len(headers), shape, batches, tuple(others), odd, _notes(root, left_out, headers), names)


def _notes(root: Path, left_out: Sequence[str], headers: Mapping[str, _Header]) -> tuple[str, ...]:
    """A line for the files that were left out, and for each way in which others are not read as they are."""
    found: dict[str, list[str]] = {}
    if left_out:
        found[f"left out (read are {', '.join(FORMATS)}; npy as uint8 [H, W, 3])"] = sorted(left_out)
    for name, header in headers.items():
        for remark in header.remarks:
            found.setdefault(remark, []).append(name)
    lines = []
    for what, names in found.items():
        shown = ", ".join([*names[:NAMED], *(["…"] if len(names) > NAMED else [])])
        lines.append(f"reference {root.name!r}: {len(names):,} file{'s' * (len(names) > 1)} {what}: {shown}")
    return tuple(lines)


def _is_npy(name: str) -> bool:
    return name.lower().endswith(".npy")


def _npy_header(file: IO[bytes], path: Path) -> _Header | None:
    """Of an image stored as one array uint8 [H, W] or [H, W, 1 or 3]; None where the array is something else."""
    start = file.read(START)
    if fault := not_content(start):
        raise StatisticsError(f"{path}: {fault}")
    file.seek(0)
    try:
        shape, _, dtype = npy_header(file)
    except (ValueError, OSError, SyntaxError) as error:
        raise StatisticsError(f"{path} is not a readable array; remove or replace it") from error
    if dtype != np.uint8 or len(shape) not in (2, 3) or 0 in shape or shape[2:] not in ((), (1,), (3,)):
        return None
    return _Header((shape[0], shape[1]), shape[2:] != (3,))


def _header(file: IO[bytes], path: Path) -> _Header:
    with _image(file, path) as image:
        raw_mode, *more = _raw_format(image)
        grey = image.mode in GREY_MODES or _is_deep_grey(image) or raw_mode.startswith("LA")
        remarks = []
        deep_bitmap = image.format == "PPM" and any(int(largest) > 255 for largest in more)
        if ";16" in raw_mode or _is_deep_grey(image) or deep_bitmap:
            remarks.append("of 16 bits a channel read in their upper 8")
        if "A" in image.getbands() or "transparency" in image.info:
            remarks.append("read without transparency, as clean-fid does")
        if getattr(image, "n_frames", 1) > 1:
            remarks.append("of several images read for the first one")
        if _is_turned(image):
            remarks.append("read without being turned as their EXIF says, as clean-fid does")
        return _Header((image.height, image.width), grey, tuple(remarks))


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF asks for another orientation. A PNG would be decoded whole to look for it, and has it rarely."""
    if image.format == "PNG":
        return False
    try:
        return bool(image.getexif().get(ORIENTATION, 1) != 1)
    except Exception:  # cameras write much that PIL cannot read, in images that it can
        return False


def _raw_format(image: Image.Image) -> list[str]:
    """How pixels lie in the file, of a portable bitmap with its largest value; PIL opens colour of 16 bits as of 8."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return [arguments] if isinstance(arguments, str) else [str(argument) for argument in arguments or [""]]


def _is_deep_grey(image: Image.Image) -> bool:
    """Whether pixels are 16 bits of grey; of the formats that PIL opens as 32 bits, only PGM's have no more."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


@contextmanager
def _image(file: IO[bytes], path: Path) -> Iterator[Image.Image]:
    """An opened image of 8 or 16 bits a channel; StatisticsError where it is none, also while it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged EXIF and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if image.mode not in GREY_MODES | COLOUR_MODES and not _is_deep_grey(image):
                    raise StatisticsError(
                        f"{path} has {image.mode!r} pixels; images must be grey or RGB of 8 or 16 bits a channel"
                    )
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise StatisticsError(f"{path} claims more pixels than an image has; remove or replace it") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        file.seek(0)
        fault = not_content(file.read(START)) or "is not a readable image; remove or replace it"
        raise StatisticsError(f"{path} {fault}") from error


def _decoded(file: IO[bytes], path: Path, mode: str) -> Pixels:
    """uint8 [H, W, 1 or 3]."""
    if _is_npy(path.name):
        try:
            array = np.load(file, allow_pickle=False)
            image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        except (ValueError, EOFError, OSError, TypeError, MemoryError) as error:
            raise StatisticsError(f"{path} is not a readable array; remove or replace it") from error
        pixels = np.array(image.convert(mode))
    else:
        with _image(file, path) as opened:
            pixels = np.array((_upper_half(opened) if _is_deep_grey(opened) else opened).convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _upper_half(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, which is what PIL itself reads of such colours; of grey, its ``convert`` clips them."""
    return Image.fromarray((np.array(image).astype(np.uint32) >> 8).astype(np.uint8))


def _channels_first(images: Pixels) -> Pixels:
    """A new, writable array [B, C, H, W] of ``images`` [B, H, W, C]."""
    return np.array(images.transpose(0, 3, 1, 2), order="C", copy=True)


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
