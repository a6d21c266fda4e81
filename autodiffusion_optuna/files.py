"""Files that may hold something else than their name says: Git LFS pointers, web pages, nothing at all. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from autodiffusion_optuna.errors import AdoptError, ModelError, first_line

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
    if reason := not_content(start):
        raise error(f"{path}: {reason}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ``ModelError`` where the file holds none."""
    check_content(path, ModelError)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({first_line(error)}); save it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds a JSON {type(data).__name__}, expected an object; save it again")
    return data
