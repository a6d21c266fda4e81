"""What a file of statistics, features or images holds, in each of the field's formats. Torch only for its own files.

Nothing is unpickled but through ``pickles``, no array is loaded before its header was checked, and images are
not loaded at all until they are asked for.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from autodiffusion_optuna.config import Mode
from autodiffusion_optuna.errors import StatisticsError, first_line
from autodiffusion_optuna.evaluation.references.images import (
    BAD_ZIP,
    MAX_MEMBER,
    Images,
    NpyHeader,
    array_images,
    folder_images,
    npy_header,
    stream_images,
    zip_images,
    zip_members,
)
from autodiffusion_optuna.evaluation.references.pickles import read_pickle
from autodiffusion_optuna.files import check_content

Array = npt.NDArray[Any]
MODES: tuple[Mode, ...] = get_args(Mode)

FORMAT = 1
FEATURE_KEYS = ("feats", "reps", "features")
MOMENTS = {"mu", "sigma"}
ADM_KEYS = {"mu_s", "sigma_s"}
CLEANFID_NAME = re.compile(
    r"(?P<name>.+)_(?P<mode>clean|legacy_pytorch|legacy_tensorflow)(?P<clip>_clip_vit_b_32)?"
    r"_(?P<split>[a-z0-9]+)_(?P<size>\d+|na)(?P<kid>_kid)?",
    flags=re.IGNORECASE,
)
UNKNOWN = "statistics (mu, sigma) of unknown make"
DAMAGED = (*BAD_ZIP, ValueError, TypeError, SyntaxError, MemoryError)
LISTED = 8
"""Arrays of a file that a message names."""
IMAGES = "uint8 [N, H, W], or [N, H, W, C] with C = 1 or 3"
ADVICE = "give an npz file, a folder or zip of images, or statistics in a known format"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance, or features [N, D], as a file holds them: unchecked, in its own dtype.

    ``what``: their origin in words. ``extractor`` and ``mode``: what made them, None where nothing says so.
    ``n``: images behind them, None where nothing says so.
    """

    what: str
    mu: Array | None = None
    sigma: Array | None = None
    features: Array | None = None
    extractor: str | None = None
    mode: Mode | None = None
    n: int | None = None


class Meta(BaseModel):
    """What our own files say of themselves, as JSON. ``size``: (height, width) of the images."""

    version: int = FORMAT
    extractor: str
    fingerprint: str
    n: int | None
    dataset: str
    channels: int | None = None
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ReferenceData:
    """Everything usable in a file or folder. With ``meta``, ``statistics`` has the one entry it describes.

    ``shown``: some of the images behind our own file, uint8 [N, C, H, W].
    """

    what: str
    statistics: tuple[Statistics, ...] = ()
    images: Images | None = None
    meta: Meta | None = None
    shown: npt.NDArray[np.uint8] | None = None


def read_reference_data(path: Path) -> ReferenceData:
    """What ``path`` holds, recognised by its first bytes and its keys, never by its suffix alone.

    ======================  =========================================================================
    folder, zip             images of ``images.FORMATS``, those of clean-fid, sorted by path
    npz of ours             meta, mu, sigma[, features][, images]
    clean-fid               npz: mu, sigma; its ``_kid`` file: feats. Of two side by side both are read.
                            The name ``DATASET_MODE[_clip_vit_b_32]_SPLIT_SIZE.npz`` says what made them.
    ADM (guided-diffusion)  npz: mu, sigma, mu_s, sigma_s[, arr_0]: Inception, mode legacy_tensorflow
    pytorch-fid, TTUR, EDM  npz: mu, sigma, and no word of what made them
    sample batches          npz: uint8 [N, H, W] or [N, H, W, 1 or 3], as arr_0 or its only one; a npy of the same
    features                npz: feats, reps or features float [N, D]; a npy of the same
    dgm-eval                npz: reps and model (dinov2; its other networks are none of ours)
    EDM2                    pickle: fid (Inception, legacy_tensorflow) and fd_dinov2, each with mu, sigma
    AutoDiffusion           pickle of FIDStatistics: Inception, mode legacy_tensorflow
    torch-fidelity          pt: mu, sigma as numpy arrays, or a tensor of features; of unknown make
    ======================  =========================================================================

    StatisticsError (one line) for anything else, for damaged files, and for zips and arrays that claim absurd
    sizes.
    """
    if path.is_dir():
        return ReferenceData("a folder of images", images=folder_images(path))
    require_reference(path)
    check_content(path, StatisticsError)
    try:
        return _read_file(path)
    except DAMAGED as error:
        raise _unknown(path, first_line(error)) from error


def require_reference(path: Path) -> None:
    """StatisticsError where there is nothing at ``path``."""
    if not path.exists():
        raise StatisticsError(f"reference {str(path)!r} does not exist; {ADVICE}")


def _unknown(path: Path, reason: str) -> StatisticsError:
    return StatisticsError(
        f"reference {str(path)!r} is not an npz of plain arrays, nor another known format ({reason}); {ADVICE}"
    )


def _read_file(path: Path) -> ReferenceData:
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return _npy(path)
    if start[:4] == b"PK\x03\x04":
        return _zip(path)
    if path.suffix.lower() in (".pt", ".pth"):
        return _torch_file(path)
    if start[:1] == b"\x80":
        return _pickle(path)
    raise ValueError(f"begins with {start!r}")


def _zip(path: Path) -> ReferenceData:
    # Whatever else lies in an archive of images, its folders and arrays too, is named among what was left out.
    files = {info.filename for info in zip_members(path)}
    if files and all(name.endswith(".npy") and "/" not in name for name in files):
        return _npz(path)
    if any(name.endswith("/data.pkl") and name.replace("data.pkl", "version") in files for name in files):
        return _torch_file(path)
    return ReferenceData("a zip of images", images=zip_images(path))


# Arrays


def _checked_header(path: Path, name: str, stream: IO[bytes], held: int) -> NpyHeader:
    header = npy_header(stream)
    if header.dtype.hasobject:
        raise _unknown(path, f"{name} is an array of objects, which is code")
    if header.nbytes > held:
        raise StatisticsError(
            f"{path}: {name} claims {header.nbytes:,} bytes and holds at most {held:,}; copy the file again"
        )
    return header


def _check_small(path: Path, name: str, header: NpyHeader) -> None:
    if header.nbytes > MAX_MEMBER:
        raise StatisticsError(f"{path}: {name} claims {header.nbytes:,} bytes; at most {MAX_MEMBER:,} are loaded")


def _image_shape(header: NpyHeader) -> tuple[int, ...] | None:
    """(N, H, W, C) of an array of images, grey ones with or without C; None for another array."""
    shape = header.shape
    if len(shape) == 3 and shape[2] not in (1, 3):  # else one image in colour
        shape = (*shape, 1)
    fits = header.dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3) and 0 not in shape[1:]
    return shape if fits else None


def _check_images(path: Path, name: str, header: NpyHeader) -> tuple[int, ...]:
    """``_image_shape`` of an array that must hold images."""
    shape = _image_shape(header)
    if shape is None:
        raise StatisticsError(f"{path}: {name} is {header.dtype} {list(header.shape)}; images are {IMAGES}")
    return shape


def _npy(path: Path) -> ReferenceData:
    with path.open("rb") as file:
        header = _checked_header(path, "the array", file, path.stat().st_size)
    if len(header.shape) == 4 or _image_shape(header):
        shape = _check_images(path, "the array", header)
        return ReferenceData("an array of images", images=array_images(np.load(path, mmap_mode="r").reshape(shape)))
    _check_small(path, "the array", header)
    if len(header.shape) != 2 or not np.issubdtype(header.dtype, np.floating):
        raise ValueError(f"one array, {header.dtype} {list(header.shape)}")
    features = np.load(path)
    return ReferenceData("an array of features", (Statistics("features", features=features, n=len(features)),))


class _Npz:
    """The arrays of a npz, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        check_content(path, StatisticsError)
        self.path = path
        self.members = {info.filename.removesuffix(".npy"): info for info in zip_members(path)}

    def stream(self, key: str) -> IO[bytes]:
        """A member from its start; it keeps the file open until it is closed."""
        with zipfile.ZipFile(self.path) as archive:
            return archive.open(self.members[key])

    def header(self, key: str) -> NpyHeader:
        with self.stream(key) as stream:
            return _checked_header(self.path, key, stream, self.members[key].file_size)

    def plain_header(self, key: str) -> NpyHeader | None:
        """Of an array whose header can be read, unchecked; also where that of another cannot."""
        try:
            with self.stream(key) as stream:
                return npy_header(stream)
        except DAMAGED:
            return None

    def batches(self) -> list[str]:
        """Names of the arrays of images: those with a channel axis, else grey ones without."""
        headers = {key: header for key in self.members if (header := self.plain_header(key)) and _image_shape(header)}
        return [key for key, header in headers.items() if len(header.shape) == 4] or list(headers)

    def listed(self) -> str:
        """Its arrays with their types and shapes, by name."""
        headers = ((key, self.plain_header(key)) for key in sorted(self.members))
        shown = [f"{key} ({header.dtype} {list(header.shape)})" if header else key for key, header in headers]
        return ", ".join([*shown[:LISTED], *([f"{len(shown) - LISTED} others"] if len(shown) > LISTED else [])])

    def data(self, key: str) -> IO[bytes]:
        """A member from the first byte after its header."""
        stream = self.stream(key)
        npy_header(stream)
        return stream

    def array(self, key: str) -> Array:
        _check_small(self.path, key, self.header(key))
        with self.stream(key) as stream:
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
        return array

    def get(self, key: str) -> Array | None:
        return self.array(key) if key in self.members else None

    def images(self, key: str) -> Images:
        header = self.header(key)
        shape = _check_images(self.path, key, header)
        if header.fortran:
            return array_images(self.array(key).reshape(shape))
        return stream_images(lambda: self.data(key), shape, self.path)


def _npz(path: Path) -> ReferenceData:
    npz = _Npz(path)
    if "meta" in npz.members:
        return _own(npz)
    statistics = _npz_statistics(npz)
    images = _npz_images(npz, alone=statistics is None)
    if statistics is None and images is None:
        raise StatisticsError(
            f"{path}: holds {npz.listed() or 'nothing'}; it needs mu and sigma, features, or one array of images, "
            f"{IMAGES}, which is arr_0 where there are several"
        )
    found = [*([statistics.what] if statistics else []), *(["images"] if images else [])]
    return ReferenceData(" and ".join(found), (statistics,) if statistics else (), images)


def _own(npz: _Npz) -> ReferenceData:
    path = npz.path
    try:
        meta = Meta.model_validate_json(str(npz.array("meta")))
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")
        raise StatisticsError(f"{path}: its meta is damaged ({reason}); build the reference again") from error
    if meta.version != FORMAT:
        raise StatisticsError(f"{path}: has format {meta.version}, this is for {FORMAT}; build the reference again")
    shown = npz.get("images")
    if shown is not None and (shown.dtype != np.uint8 or shown.ndim != 4):
        raise StatisticsError(f"{path}: images are {shown.dtype} {list(shown.shape)}; build the reference again")
    statistics = Statistics(
        "a reference of adopt", npz.get("mu"), npz.get("sigma"), npz.get("features"), meta.extractor, n=meta.n
    )
    return ReferenceData(statistics.what, (statistics,), meta=meta, shown=shown)


def _npz_images(npz: _Npz, alone: bool) -> Images | None:
    """The images of arr_0, or where nothing else is usable (``alone``) of the only array that has some."""
    keys = npz.members.keys()
    batches = npz.batches()
    if "arr_0" in keys and len(npz.header("arr_0").shape) != 2:
        images, others = npz.images("arr_0"), sorted({*batches} - {"arr_0"})
        if others:
            note = f"reference {npz.path.stem!r}: images in {', '.join(others)} left out, as those in arr_0 are read"
            images = replace(images, notes=(note,))
        return images
    if alone and (len(batches) == 1 or (len(keys) == 1 and len(npz.header(*keys).shape) == 4)):
        return npz.images(*(batches or keys))
    return None


def _npz_statistics(npz: _Npz) -> Statistics | None:
    """The statistics or features of a npz that is not ours, with what its keys and its name tell."""
    keys, path = npz.members.keys(), npz.path
    key = next((key for key in FEATURE_KEYS if key in keys), None)
    if key is None and "arr_0" in keys and len(npz.header("arr_0").shape) == 2:
        key = "arr_0"
    cleanfid = CLEANFID_NAME.fullmatch(path.stem)
    if key is not None and cleanfid and cleanfid["kid"]:
        main = path.with_name(path.name[: -len("_kid.npz")] + ".npz")
        return _cleanfid(_Npz(main) if main.is_file() else None, npz, cleanfid)
    if keys >= MOMENTS | ADM_KEYS:
        return _moments(npz, "ADM statistics", "inception", "legacy_tensorflow")
    if keys >= MOMENTS and cleanfid:
        kid = path.with_name(path.stem + "_kid.npz")
        return _cleanfid(npz, _Npz(kid) if kid.is_file() else None, cleanfid)
    if keys >= MOMENTS:
        return _moments(npz, UNKNOWN)
    if key is None:
        return None
    features = npz.array(key)
    made_by = str(npz.array("model")) if key == "reps" and "model" in keys else None
    what = f"features of dgm-eval's {made_by}" if made_by else "features of unknown make"
    # dgm-eval's Inception is none of clean-fid's three modes, and only its DINOv2 is ours as well.
    known = made_by if made_by in (None, "dinov2") else f"dgm-eval {made_by}"
    return Statistics(what, features=features, extractor=known, n=len(features))


def _moments(npz: _Npz, what: str, extractor: str | None = None, mode: Mode | None = None) -> Statistics:
    return Statistics(what, npz.array("mu"), npz.array("sigma"), extractor=extractor, mode=mode)


def _cleanfid(moments: _Npz | None, kid: _Npz | None, name: re.Match[str]) -> Statistics:
    clip, mode = bool(name["clip"]), name["mode"].lower()
    features = kid.get("feats") if kid else None
    mu, sigma = (moments.get(key) if moments else None for key in ("mu", "sigma"))
    return Statistics(
        what=f"clean-fid statistics, {'CLIP' if clip else f'mode {mode}'}",
        mu=mu,
        sigma=sigma,
        features=features,
        extractor="clip" if clip else "inception",
        mode=None if clip else mode,  # type: ignore[arg-type]
        n=len(features) if features is not None and mu is None else None,
    )


# Pickles


def _pickle(path: Path) -> ReferenceData:
    value = read_pickle(path)
    statistics: list[Statistics] = []
    if isinstance(value, dict):
        count = value.get("num_images")
        n = count if isinstance(count, int) else None
        makes: tuple[tuple[Any, str, str | None, Mode | None], ...] = (
            (value.get("fid"), "EDM2 statistics", "inception", "legacy_tensorflow"),
            (value.get("fd_dinov2"), "EDM2 statistics of DINOv2", "dinov2", None),
            (value.get("FIDStatistics"), "AutoDiffusion statistics", "inception", "legacy_tensorflow"),
            (value, UNKNOWN, None, None),
        )
        for moments, what, extractor, mode in makes:
            if isinstance(moments, dict) and moments.keys() >= MOMENTS:
                mu, sigma = (_an_array(path, key, moments[key]) for key in ("mu", "sigma"))
                statistics.append(Statistics(what, mu, sigma, extractor=extractor, mode=mode, n=n))
    elif isinstance(value, list) and len(value) == 2:
        mu, sigma = (_an_array(path, key, part) for key, part in zip(("mu", "sigma"), value, strict=True))
        statistics.append(Statistics(UNKNOWN, mu, sigma))
    elif isinstance(value, np.ndarray) and value.ndim == 2:
        statistics.append(Statistics("features of unknown make", features=value, n=len(value)))
    if not statistics:
        raise StatisticsError(
            f"{path}: is a pickle of {_described(value)}; it needs mu and sigma, EDM2's fid, or FIDStatistics"
        )
    return ReferenceData(" and ".join(part.what for part in statistics), tuple(statistics))


def _an_array(path: Path, key: str, value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        raise StatisticsError(f"{path}: {key} is a {type(value).__name__}, not an array")
    return value


def _described(value: Any) -> str:
    return f"a dict of {', '.join(map(str, value))[:80]}" if isinstance(value, dict) else type(value).__name__


def _torch_file(path: Path) -> ReferenceData:
    import torch

    # torch's own restricted unpickler, with numpy's way to rebuild plain arrays; older files name the old module.
    rebuild: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
    codes = "fdeilqhbBHILQ?"
    plain: list[Any] = [
        rebuild,
        (rebuild, "numpy.core.multiarray._reconstruct"),
        (rebuild, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in codes},
    ]
    try:
        with torch.serialization.safe_globals(plain), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch wraps whatever a damaged or hostile file makes it meet
        reason = re.search(r"global (\S+)|Unsupported \S+ \S+", str(error), flags=re.IGNORECASE)
        shown = reason[0] if reason else first_line(error)
        raise StatisticsError(
            f"{path}: is not a torch file of plain arrays ({shown}); only tensors and numpy arrays are read"
        ) from error
    if isinstance(value, dict) and value.keys() >= MOMENTS:
        mu, sigma = np.asarray(value["mu"]), np.asarray(value["sigma"])
        found = Statistics("torch-fidelity statistics of unknown make", mu, sigma)
    elif isinstance(value, torch.Tensor) and value.ndim == 2:
        found = Statistics("torch-fidelity features of unknown make", features=value.numpy(), n=len(value))
    else:
        raise StatisticsError(
            f"{path}: is a torch file of {_described(value)}; it needs mu and sigma, or features [N, D]"
        )
    return ReferenceData(found.what, (found,))
