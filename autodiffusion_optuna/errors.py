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
from collections.abc import Iterable


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


def choose_from(what: str, given: str, known: Iterable[str]) -> str:
    """One line for an unknown name: what was given, the nearest known name, and all that exist.

    >>> choose_from("solver", "dim", ["ddim", "heun"])
    "unknown solver 'dim'; did you mean 'ddim'? Known: ddim, heun"
    """
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(names)}"
