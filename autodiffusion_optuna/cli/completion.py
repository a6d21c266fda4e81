"""What the shell offers after Tab: names of studies, settings and their values. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args, get_origin

import typer

from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.storage.url import sqlite_path, storage_url

ENGINES = ("local", "ray", "slurm")
EXTRACTORS = ("digits", "faces", "pixels", "inception", "clip", "dinov2", "efficientnet-lite0", "torchscript", "python")
MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")
"""Choices as they are where they are used, whose imports take seconds: help and Tab have no time for that."""


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Completion of an option that takes one of ``names``."""

    def complete(incomplete: str) -> list[str]:
        return _starting(incomplete, names)

    return complete


def begun_studies(context: typer.Context) -> list[str]:
    """Studies in the SQLite file that the command names so far: a server may be away, and Tab must not wait for it."""
    from autodiffusion_optuna.storage.studies import find_storage, study_names

    try:
        url = storage_url(context.params.get("storage"))
        storage = None if sqlite_path(url) is None else find_storage(url)
        return [] if storage is None else study_names(storage)
    except AdoptError:  # it is said when the command runs
        return []


def complete_begun(context: typer.Context, incomplete: str) -> list[str]:
    """Studies in the database."""
    return _starting(incomplete, begun_studies(context))


def complete_study(context: typer.Context, incomplete: str) -> list[str]:
    """Studies in the database, and presets."""
    from autodiffusion_optuna.config import presets

    return _starting(incomplete, dict.fromkeys([*begun_studies(context), *presets()]))


def complete_setting(incomplete: str) -> list[str]:
    """``key=`` of each setting, and ``key=value`` once the key of one with a fixed choice is whole."""
    from autodiffusion_optuna.config import known_keys

    key, equals, _ = incomplete.partition("=")
    if equals:
        return _starting(incomplete, [f"{key}={value}" for value in _choices(key)])
    return _starting(incomplete, [f"{key}=" for key in sorted(known_keys())])


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _choices(key: str) -> list[str]:
    """Values that a setting's type allows; empty where it is free."""
    from autodiffusion_optuna.config import StudyConfig

    annotation: object = StudyConfig
    for name in key.split("."):
        fields = getattr(annotation, "model_fields", {})
        if name not in fields:
            return []
        annotation = fields[name].annotation
    kinds = [annotation, *get_args(annotation)]
    return [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
