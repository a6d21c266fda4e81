"""The result of a command, and the type of the fixture that runs one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Result:
    """What one command printed and how it ended."""

    code: int
    out: str
    err: str


Adopt = Callable[..., Result]
