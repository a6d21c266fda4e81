"""Files that commands write: whether they can be is looked at first, before anything is loaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from autodiffusion_optuna.errors import ConfigError


def check_out(path: Path, what: str, example: str, *, force: bool = True) -> None:
    """ConfigError where ``what`` could not be written to ``path``, or where a file is there and not to be replaced."""
    try:
        path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; give another --out") from None
    if not path.parent.is_dir():
        raise ConfigError(f"folder {str(path.parent)!r} for {what} does not exist; create it or give another --out")
    if path.is_dir():
        raise ConfigError(f"--out {str(path)!r} is a folder; give a file, for example --out {path / example}")
    if path.exists() and not force:
        raise ConfigError(f"{str(path)!r} exists; pass --force to overwrite it, or give another --out")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"cannot write {str(path)!r}: it is read-only; give another --out")
    try:  # rather than ask: root is told yes on a read-only mount
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; give another --out") from None
