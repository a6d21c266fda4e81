"""Statistics from pickles, without running what a pickle asks for. No torch.

A pickle is a program. The numpy globals that real statistics files name are mapped to small inert classes
below, which build an array from its bytes and can do nothing else; any other global is refused by name.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodiffusion_optuna.errors import StatisticsError, first_line

MAX_BYTES = 2**30
PLAIN_DTYPE = re.compile(r"[<>=|]?[biuf][1248]")


class FIDStatistics:
    """Stands for guided-diffusion's and AutoDiffusion's class of that name: ``mu`` and ``sigma``."""

    mu: Any = None
    sigma: Any = None


class _Dtype:
    """Stands for ``numpy.dtype``: plain numbers only."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not PLAIN_DTYPE.fullmatch(code):
            raise StatisticsError(f"it holds an array of {str(code)[:40]!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for ``numpy.ndarray``; called by ``_reconstruct`` with placeholders, filled by ``__setstate__``."""

    array: npt.NDArray[Any]

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> npt.NDArray[Any]:
    if not isinstance(dtype, _Dtype):
        raise StatisticsError("it holds an array that does not say what numbers it has")
    return np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order=order)


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    built = _Array()
    built.array = _array(data, dtype, shape, order)
    return built


def _encode(text: str, codec: str = "latin1") -> bytes:
    """Protocol 2 writes bytes as text in latin1."""
    if codec != "latin1":
        raise StatisticsError(f"it encodes text as {codec!r}")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    """Global -> stand-in, new ones for each pickle: it may set attributes of whatever it is given."""
    array, dtype = type("Array", (_Array,), {}), type("Dtype", (_Dtype,), {})
    return {
        ("numpy.core.multiarray", "_reconstruct"): array,
        ("numpy._core.multiarray", "_reconstruct"): array,
        ("numpy.core.numeric", "_frombuffer"): lambda *arguments: _frombuffer(*arguments),
        ("numpy._core.numeric", "_frombuffer"): lambda *arguments: _frombuffer(*arguments),
        ("numpy", "ndarray"): array,
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): lambda *arguments: _encode(*arguments),
    }


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.allowed = _allowed()
        self.statistics = type("FIDStatistics", (FIDStatistics,), {})

    def find_class(self, module: str, name: str) -> Any:
        if name == "FIDStatistics":
            return self.statistics
        if (module, name) not in self.allowed:
            raise StatisticsError(f"it asks for {module}.{name}, which is not data")
        return self.allowed[module, name]


def read_pickle(path: Path) -> Any:
    """What a pickle of dicts, lists, numbers, numpy arrays and ``FIDStatistics`` holds; protocols 2 to 5.

    StatisticsError where it names any other global (nothing of it is run), is damaged or larger than 1 GiB.
    """
    advice = "only pickles of arrays, dicts and FIDStatistics are read"
    if path.stat().st_size > MAX_BYTES:
        raise StatisticsError(f"{path}: is a pickle of {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
    try:
        return _plain(_Unpickler(io.BytesIO(path.read_bytes())).load())
    except StatisticsError as error:
        raise StatisticsError(f"{path}: is a pickle that is not read: {error}; {advice}") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise StatisticsError(f"{path}: is a damaged pickle ({first_line(error)}); {advice}") from error


def _plain(value: Any) -> Any:
    """``value`` with the stand-ins replaced by the arrays they built, two levels deep: all that formats use."""
    if isinstance(value, FIDStatistics):
        return {"FIDStatistics": {key: _leaf(getattr(value, key)) for key in ("mu", "sigma")}}
    if isinstance(value, dict):
        return {key: _plain(part) if isinstance(part, dict) else _leaf(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_leaf(part) for part in value]
    return _leaf(value)


def _leaf(value: Any) -> Any:
    return value.array if isinstance(value, _Array) else value
