"""Files that hold something else than their name says: Git LFS pointers, web pages, nothing at all. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from autodiffusion_optuna.errors import AdoptError

START = 256
"""Bytes from which ``not_content`` knows."""

POINTER = b"version https://git-lfs.github.com/spec/"
PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", flags=re.IGNORECASE)
"""What a server answers in place of a file, Amazon's S3 as XML."""


def not_content(start: bytes) -> str | None:
    """What a file is whose first ``START`` bytes hold no data at all, and what to do; None where there may be data."""
    if not start:
        return "is empty, so it is damaged or cut short; copy it again"
    if start.startswith(POINTER):
        return "is a Git LFS pointer: run git lfs pull"
    if PAGE.match(start):
        return "is a web page that was saved in place of the file; download it again"
    return None


def check_content(path: Path, error: type[AdoptError]) -> None:
    """``error``, one line, where ``not_content`` knows the file at ``path``; one that cannot be read passes here."""
    try:
        with path.open("rb") as file:
            start = file.read(START)
    except OSError:
        return
    if told := not_content(start):
        raise error(f"{path}: {told}")
