"""The result of a command, what it must be where it is refused, and the type of the fixture that runs one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Result:
    """What one command printed and how it ended."""

    code: int
    out: str
    err: str


Adopt = Callable[..., Result]


def check_refused(result: Result, *expected: str) -> None:
    """The command ended with one line of the texts ``expected``."""
    assert result.code == 1, result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for text in expected:
        assert text in result.err


def listing(folder: Path) -> list[str]:
    """All that lies in a folder, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
