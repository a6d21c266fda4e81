"""What a file of statistics, features or images holds, in each of the field's formats. Torch only for its own files.

Nothing is unpickled but through ``pickles``, no array is loaded before its header was checked, and images are
not loaded at all until they are asked for.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.files import check_content
from autodiffusion_optuna.evaluation.references.images import (
    BAD_ZIP,
    MAX_MEMBER,
    Images,
    array_images,
    check_member,
    folder_images,
    stream_images,
    zip_images,
)
from autodiffusion_optuna.evaluation.references.pickles import read_pickle

Array = npt.NDArray[Any]
Mode = Literal["clean", "legacy_pytorch", "legacy_tensorflow"]
MODES: tuple[Mode, ...] = get_args(Mode)

FORMAT = 1
FEATURE_KEYS = ("feats", "reps", "features")
ADM_KEYS = {"mu_s", "sigma_s"}
CLEANFID_NAME = re.compile(
    r"(?P<name>.+)_(?P<mode>clean|legacy_pytorch|legacy_tensorflow)(?P<clip>_clip_vit_b_32)?"
    r"_(?P<split>[a-z0-9]+)_(?P<size>\d+|na)(?P<kid>_kid)?",
    flags=re.IGNORECASE,
)
DAMAGED = (*BAD_ZIP, ValueError, TypeError, SyntaxError, MemoryError)


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


@dataclass(frozen=True, eq=False)
class Meta:
    """What our own files say of themselves. ``size``: (height, width) of the images."""

    extractor: str
    fingerprint: str
    n: int | None
    dataset: str
    channels: int | None
    size: tuple[int, int] | None
    notes: tuple[str, ...] = ()
    images: npt.NDArray[np.uint8] | None = None
    """Some of its images, uint8 [N, C, H, W]."""


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything usable in a file or folder. With ``meta``, ``statistics`` has the one entry it describes."""

    what: str
    statistics: tuple[Statistics, ...] = ()
    images: Images | None = None
    meta: Meta | None = None


def read_contents(path: Path) -> Contents:
    """What ``path`` holds, recognised by its first bytes and its keys, never by its suffix alone.

    ======================  =========================================================================
    folder, zip             images of ``images.FORMATS``, those of clean-fid, sorted by path
    npz of ours             meta, mu, sigma[, features][, images]
    clean-fid               npz: mu, sigma; its ``_kid`` file: feats. Of two side by side both are read.
                            The name ``DATASET_MODE[_clip_vit_b_32]_SPLIT_SIZE.npz`` says what made them.
    ADM (guided-diffusion)  npz: mu, sigma, mu_s, sigma_s[, arr_0]: Inception, mode legacy_tensorflow
    pytorch-fid, TTUR, EDM  npz: mu, sigma, and no word of what made them
    sample batches          npz: uint8 [N, H, W, 1 or 3] as arr_0, or as its only array of images; a npy of the same
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
        return Contents("a folder of images", images=folder_images(path))
    if not path.exists():
        raise StatisticsError(f"reference {str(path)!r} does not exist; {ADVICE}")
    check_content(path, StatisticsError)
    try:
        return _read_file(path)
    except DAMAGED as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise _unknown(path, reason) from error


ADVICE = "give an npz file, a folder or zip of images, or statistics in a known format"


def _unknown(path: Path, reason: str) -> StatisticsError:
    return StatisticsError(
        f"reference {str(path)!r} is not an npz of plain arrays, nor another known format ({reason}); {ADVICE}"
    )


def _read_file(path: Path) -> Contents:
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return _npy(path)
    if start[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for info in archive.infolist():
                check_member(path, info)
        # Whatever else lies in an archive of images, its folders and arrays too, is told among what was left out.
        files = [name for name in names if not name.endswith("/")]
        if files and all(name.endswith(".npy") and "/" not in name for name in files):
            return _npz(path, {name.removesuffix(".npy"): name for name in files})
        if any(name.endswith("/data.pkl") and name.replace("data.pkl", "version") in files for name in files):
            return _torch_file(path)
        return Contents("a zip of images", images=zip_images(path))
    if path.suffix.lower() in (".pt", ".pth"):
        return _torch_file(path)
    if start[:1] == b"\x80":
        return _pickle(path)
    raise ValueError("empty" if not start else f"begins with {start!r}")


# Arrays


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for length in self.shape:
            count *= length
        return count


def _header(stream: IO[bytes]) -> _Header:
    """The header of a npy stream, which then stands at its data."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return _Header(*np.lib.format.read_array_header_1_0(stream))
    if version == (2, 0):
        return _Header(*np.lib.format.read_array_header_2_0(stream))
    raise ValueError(f"array format {version[0]}.{version[1]}")


def _checked(path: Path, name: str, header: _Header, held: int) -> _Header:
    if header.dtype.hasobject:
        raise _unknown(path, f"{name} is an array of objects, which is code")
    if header.nbytes > held:
        raise StatisticsError(
            f"{path}: {name} claims {header.nbytes:,} bytes and holds at most {held:,}; copy the file again"
        )
    return header


def _small(path: Path, name: str, header: _Header) -> None:
    if header.nbytes > MAX_MEMBER:
        raise StatisticsError(f"{path}: {name} claims {header.nbytes:,} bytes; at most {MAX_MEMBER:,} are loaded")


def _is_images(header: _Header) -> bool:
    return header.dtype == np.uint8 and len(header.shape) == 4 and header.shape[3] in (1, 3)


def _bad_images(path: Path, name: str, header: _Header) -> StatisticsError:
    return StatisticsError(f"{path}: {name} is {header.dtype} {list(header.shape)}; images are uint8 [N, H, W, 1 or 3]")


def _npy(path: Path) -> Contents:
    with path.open("rb") as file:
        header = _checked(path, "the array", _header(file), path.stat().st_size)
    if _is_images(header):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return Contents("an array of images", images=array_images(array))
    if len(header.shape) == 4:
        raise _bad_images(path, "the array", header)
    _small(path, "the array", header)
    if len(header.shape) != 2 or not np.issubdtype(header.dtype, np.floating):
        raise ValueError(f"one array, {header.dtype} {list(header.shape)}")
    features = np.load(path, allow_pickle=False)
    return Contents("an array of features", (Statistics("features", features=features, n=len(features)),))


class _Npz:
    """The arrays of a npz, each read when it is asked for."""

    def __init__(self, path: Path, members: Mapping[str, str]) -> None:
        self.path, self.members = path, members

    def stream(self, key: str) -> IO[bytes]:
        """A member from its start; it keeps the file open until it is closed."""
        with zipfile.ZipFile(self.path) as archive:
            return archive.open(self.members[key])

    def header(self, key: str) -> _Header:
        with zipfile.ZipFile(self.path) as archive:
            held = archive.getinfo(self.members[key]).file_size
        with self.stream(key) as stream:
            return _checked(self.path, key, _header(stream), held)

    def has_images(self, key: str) -> bool:
        """Whether an array is one of images, also where another could not be read."""
        try:
            with self.stream(key) as stream:
                return _is_images(_header(stream))
        except DAMAGED:
            return False

    def data(self, key: str) -> IO[bytes]:
        """A member from the first byte after its header."""
        stream = self.stream(key)
        _header(stream)
        return stream

    def array(self, key: str) -> Array:
        _small(self.path, key, self.header(key))
        with self.stream(key) as stream:
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
        return array

    def images(self, key: str) -> Images:
        header = self.header(key)
        if not _is_images(header):
            raise _bad_images(self.path, key, header)
        if header.fortran:
            return array_images(self.array(key))
        total, height, width, channels = header.shape
        return stream_images(lambda: self.data(key), (total, height, width, channels), self.path)


def _npz(path: Path, members: Mapping[str, str]) -> Contents:
    npz, keys = _Npz(path, members), members.keys()
    if "meta" in keys:
        return _own(npz)
    statistics = _npz_statistics(npz)
    images = None
    batches = [key for key in keys if npz.has_images(key)]
    if "arr_0" in keys and len(npz.header("arr_0").shape) != 2:
        images = npz.images("arr_0")
        others = sorted({*batches} - {"arr_0"})
        if others:
            note = f"reference {path.stem!r}: images in {', '.join(others)} left out, as those in arr_0 are read"
            images = replace(images, notes=(note,))
    found = [statistics.what] if statistics else []
    if images:
        found.append("images")
    if not found and (len(batches) == 1 or (len(keys) == 1 and len(npz.header(*keys).shape) == 4)):
        images, found = npz.images(*(batches or keys)), ["images"]
    if not found:
        raise StatisticsError(
            f"{path}: holds {', '.join(sorted(keys)) or 'nothing'}; it needs mu and sigma, features, or images in arr_0"
        )
    return Contents(" and ".join(found), (statistics,) if statistics else (), images)


def _own(npz: _Npz) -> Contents:
    path = npz.path
    try:
        meta = json.loads(str(npz.array("meta")))
        version, name, digest = int(meta["version"]), str(meta["extractor"]), str(meta["fingerprint"])
        n, dataset = None if meta["n"] is None else int(meta["n"]), str(meta["dataset"])
        channels, size = meta.get("channels"), meta.get("size")
        shape = (int(size[0]), int(size[1])) if size else None
        notes = tuple(map(str, meta.get("notes", ())))
        images = npz.array("images") if "images" in npz.members else None
        if images is not None and (images.dtype != np.uint8 or images.ndim != 4):
            raise ValueError(f"images {images.dtype} {list(images.shape)}")
        told = Meta(name, digest, n, dataset, None if channels is None else int(channels), shape, notes, images)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise StatisticsError(f"{path}: its meta is damaged ({error}); build the reference again") from error
    if version != FORMAT:
        raise StatisticsError(f"{path}: has format {version}, this is for {FORMAT}; build the reference again")
    for key in ("mu", "sigma"):
        if key not in npz.members:
            raise StatisticsError(f"{path}: {key} is missing or no float array; build the reference again")
    features = npz.array("features") if "features" in npz.members else None
    statistics = Statistics("a reference of adopt", npz.array("mu"), npz.array("sigma"), features, name, n=n)
    return Contents(statistics.what, (statistics,), meta=told)


def _npz_statistics(npz: _Npz) -> Statistics | None:
    """The statistics or features of a npz that is not ours, with what its keys and its name tell."""
    keys, path = npz.members.keys(), npz.path
    key = next((key for key in FEATURE_KEYS if key in keys), None)
    if key is None and "arr_0" in keys and len(npz.header("arr_0").shape) == 2:
        key = "arr_0"
    cleanfid = CLEANFID_NAME.fullmatch(path.stem)
    if key is not None and cleanfid and cleanfid["kid"]:
        main = path.with_name(path.name[: -len("_kid.npz")] + ".npz")
        if main.is_file():
            return _cleanfid(_Npz(main, _members(main)), npz, cleanfid)
        return _cleanfid(None, npz, cleanfid)
    if {"mu", "sigma"} <= keys:
        if keys >= ADM_KEYS:
            return _moments(npz, "ADM statistics", "inception", "legacy_tensorflow")
        if cleanfid:
            kid = path.with_name(path.stem + "_kid.npz")
            return _cleanfid(npz, _Npz(kid, _members(kid)) if kid.is_file() else None, cleanfid)
        return _moments(npz, "statistics (mu, sigma) of unknown make")
    if key is None:
        return None
    features = npz.array(key)
    made_by = str(npz.array("model")) if key == "reps" and "model" in keys else None
    what = f"features of dgm-eval's {made_by}" if made_by else "features of unknown make"
    # dgm-eval's Inception is none of clean-fid's three modes, and only its DINOv2 is ours as well.
    known = made_by if made_by in (None, "dinov2") else f"dgm-eval {made_by}"
    return Statistics(what, features=features, extractor=known, n=len(features))


def _members(path: Path) -> dict[str, str]:
    check_content(path, StatisticsError)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            check_member(path, info)
        return {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}


def _moments(npz: _Npz, what: str, extractor: str | None = None, mode: Mode | None = None) -> Statistics:
    return Statistics(what, npz.array("mu"), npz.array("sigma"), extractor=extractor, mode=mode)


def _cleanfid(moments: _Npz | None, kid: _Npz | None, name: re.Match[str]) -> Statistics:
    clip, mode = bool(name["clip"]), name["mode"].lower()
    features = kid.array("feats") if kid and "feats" in kid.members else None
    both = moments if moments and {"mu", "sigma"} <= moments.members.keys() else None
    return Statistics(
        what=f"clean-fid statistics, {'CLIP' if clip else f'mode {mode}'}",
        mu=both.array("mu") if both else None,
        sigma=both.array("sigma") if both else None,
        features=features,
        extractor="clip" if clip else "inception",
        mode=None if clip else mode,  # type: ignore[arg-type]
        n=None if both or features is None else len(features),
    )


# Pickles


def _pickle(path: Path) -> Contents:
    value = read_pickle(path)
    statistics: list[Statistics] = []
    if isinstance(value, dict):
        count = value.get("num_images")
        n = count if isinstance(count, int) else None
        makes: tuple[tuple[str, str, str | None, Mode | None], ...] = (
            ("fid", "EDM2 statistics", "inception", "legacy_tensorflow"),
            ("fd_dinov2", "EDM2 statistics of DINOv2", "dinov2", None),
            ("FIDStatistics", "AutoDiffusion statistics", "inception", "legacy_tensorflow"),
        )
        for key, what, extractor, mode in makes:
            statistics += _from_dict(path, value.get(key), what, extractor, mode, n)
        statistics += _from_dict(path, value, "statistics (mu, sigma) of unknown make", None, None, n)
    elif isinstance(value, list) and len(value) == 2:
        pair = dict(zip(("mu", "sigma"), value, strict=True))
        statistics += _from_dict(path, pair, "statistics (mu, sigma) of unknown make", None, None, None)
    elif isinstance(value, np.ndarray) and value.ndim == 2:
        statistics.append(Statistics("features of unknown make", features=value, n=len(value)))
    if not statistics:
        held = f"a dict of {', '.join(map(str, value))[:80]}" if isinstance(value, dict) else type(value).__name__
        raise StatisticsError(f"{path}: is a pickle of {held}; it needs mu and sigma, EDM2's fid, or FIDStatistics")
    return Contents(" and ".join(part.what for part in statistics), tuple(statistics))


def _from_dict(
    path: Path, value: Any, what: str, extractor: str | None, mode: Mode | None, n: int | None
) -> list[Statistics]:
    if not isinstance(value, dict) or not {"mu", "sigma"} <= value.keys():
        return []
    for key in ("mu", "sigma"):
        if not isinstance(value[key], np.ndarray):
            raise StatisticsError(f"{path}: {key} is a {type(value[key]).__name__}, not an array")
    return [Statistics(what, value["mu"], value["sigma"], extractor=extractor, mode=mode, n=n)]


def _torch_file(path: Path) -> Contents:
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
        shown = reason[0] if reason else (str(error).splitlines() or [type(error).__name__])[0]
        raise StatisticsError(
            f"{path}: is not a torch file of plain arrays ({shown}); only tensors and numpy arrays are read"
        ) from error
    if isinstance(value, dict) and {"mu", "sigma"} <= value.keys():
        moments = {key: np.asarray(value[key]) for key in ("mu", "sigma")}
        found = Statistics("torch-fidelity statistics of unknown make", moments["mu"], moments["sigma"])
    elif isinstance(value, torch.Tensor) and value.ndim == 2:
        found = Statistics("torch-fidelity features of unknown make", features=value.numpy(), n=len(value))
    else:
        held = f"a dict of {', '.join(map(str, value))[:80]}" if isinstance(value, dict) else type(value).__name__
        raise StatisticsError(f"{path}: is a torch file of {held}; it needs mu and sigma, or features [N, D]")
    return Contents(found.what, (found,))
