"""Statistics of reference images, kept between commands by all bytes of the images and all that makes the features.

A file that cannot be read is made again, and where nothing can be written nothing is kept: a command then takes longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.evaluation.references.images import Images

ENVIRONMENT = "ADOPT_CACHE"
KEPT = 32
"""References that are kept, tens of MB each with many features; those used longest ago go first."""
LIBRARIES = ("torch", "numpy", "pillow")
"""What decodes images and computes features; another version may change a bit."""

T = TypeVar("T")


def cache_folder() -> Path | None:
    """Where what can be made again is kept: ``$ADOPT_CACHE``, else ``adopt`` in ``$XDG_CACHE_HOME`` or ~/.cache."""
    if given := os.environ.get(ENVIRONMENT):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adopt"
    except RuntimeError:  # a user without a home
        return None


def remembered(
    path: Path,
    images: Images,
    facts: Any,
    build: Callable[[], T],
    read: Callable[[Path], T],
    write: Callable[[Path, T], None],
) -> T:
    """What ``build`` makes of the ``images`` at ``path``, or what it made of the same ones before.

    ``facts``: all else that it depends on, as JSON. ``read`` and ``write`` keep it in a file, and may raise AdoptError.
    """
    folder = cache_folder()
    if folder is None:
        return build()
    before = _stamp(path, images)
    file = folder / "references" / f"{_key(path, images, facts)}.npz"
    if file.is_file():
        with contextlib.suppress(AdoptError, OSError, ValueError):
            found = read(file)
            with contextlib.suppress(OSError):
                os.utime(file)
            return found
    made = build()
    if _stamp(path, images) == before:  # else it is not known which of the two it was made of
        with contextlib.suppress(AdoptError, OSError):
            _keep(file, made, write)
    return made


def _keep(file: Path, made: T, write: Callable[[Path, T], None]) -> None:
    """Put a whole file in its place, and take away those used longest ago; several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.stem}-{uuid.uuid4().hex}.npz")
    try:
        write(unfinished, made)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    files = sorted(file.parent.glob("*.npz"), key=lambda other: other.stat().st_mtime, reverse=True)
    for old in files[KEPT:]:
        old.unlink(missing_ok=True)


def _files(path: Path, images: Images) -> list[Path]:
    return [path / name for name in images.names] if path.is_dir() else [path]


def _stamp(path: Path, images: Images) -> list[tuple[int, int]]:
    """Size and time of change of each file: what shows that one was written to meanwhile."""
    stats = [file.stat() for file in _files(path, images) if file.exists()]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _key(path: Path, images: Images, facts: Any) -> str:
    """Hash of the names and all bytes of the files, in the order in which they are read, and of ``facts``."""
    versions = [importlib.metadata.version(library) for library in LIBRARIES]
    whole = hashlib.sha256(json.dumps([facts, path.stem, versions], sort_keys=True).encode())
    for file in _files(path, images):
        name = file.relative_to(path).as_posix()  # "." for a file alone
        with file.open("rb") as content:
            whole.update(f"\0{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}".encode())
    return whole.hexdigest()[:40]
