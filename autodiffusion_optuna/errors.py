"""Every error that a user can cause.

Messages say what was given, what is allowed and what to do. Only the command line catches them.

AdoptError
├── ConfigError      a study file, a ``--set`` or an argument is wrong
├── ModelError       a model, its weights or its device cannot be used
├── StatisticsError  images, features or reference statistics do not fit
├── StorageError     a database cannot be opened, read or written
└── StudyError       a study is missing, or measures something else than the config given
"""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


class AdoptError(Exception):
    """Base of all errors that are the user's to fix; ``str(error)`` is one line."""


class ConfigError(AdoptError):
    """A study file, a ``--set`` or an argument is wrong."""


class ModelError(AdoptError):
    """A model, its weights or its device cannot be used."""


class StatisticsError(AdoptError):
    """Images, features or reference statistics do not fit."""


class StorageError(AdoptError):
    """A database cannot be opened, read or written."""


class StudyError(AdoptError):
    """A study is missing, or measures something else than the config given."""


WARNING = "warning: "


class Marked(logging.Formatter):
    """Writes log records as lines: ``WARNING`` before each warning, ``note`` before what is said besides."""

    def __init__(self, note: str = "") -> None:
        super().__init__()
        self.note = note

    def format(self, record: logging.LogRecord) -> str:
        """The record as it is printed."""
        return (WARNING if record.levelno >= logging.WARNING else self.note) + super().format(record)


def choose_from(what: str, given: str, known: Iterable[str]) -> str:
    """One line for an unknown name: what was given, the nearest known name, and all that exist.

    >>> choose_from("solver", "dim", ["ddim", "heun"])
    "unknown solver 'dim'; did you mean 'ddim'? Known: ddim, heun"
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def program() -> str:
    """``adopt`` as commands that are shown must call it, so that they run where the user typed this one.

    The name alone where a shell finds this program by it, else the path or the ``python -m`` by which it was called.
    """
    called = Path(sys.argv[0] if sys.argv else "")
    if (called.parent.name, called.name) == (__package__, "__main__.py"):
        return shlex.join([sys.orig_argv[0], "-m", called.parent.name])
    if called.name != "adopt" or not called.parent.name:  # from Python, or by the name alone
        return "adopt"
    found = None if "UV" in os.environ else shutil.which("adopt")  # uvx puts it on a PATH that ends with the command
    if found is not None and Path(found).resolve() == called.resolve():
        return "adopt"
    whole, here = called.absolute(), Path.cwd()
    return shlex.quote(str(whole.relative_to(here) if whole.is_relative_to(here) else whole))
