"""Studies that tests begin and run in their own process, and what is left of them in the database."""

from __future__ import annotations

from pathlib import Path

import optuna

from autodiffusion_optuna.config import StudyConfig, load_config
from autodiffusion_optuna.storage.attrs import CANDIDATE
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.study import components, lifecycle, loop

Row = tuple[int, str, str, float | None]


def rows(url: str, name: str) -> list[Row]:
    """(number, state, candidate, value) of every trial."""
    found = load_study(open_storage(url, create=False), name)
    return [
        (t.number, t.state.name, t.user_attrs.get(CANDIDATE, ""), t.values[0] if t.values else None)
        for t in found.get_trials(deepcopy=False)
    ]


def config_with(path: Path, *overrides: str) -> StudyConfig:
    return load_config(path, overrides)


def begin(folder: Path, url: str, *settings: str) -> optuna.Study:
    """Write down what the study is."""
    return lifecycle.open_study(components.build(config_with(folder / "quick.toml", *settings)), open_storage(url))


def run(path: Path, url: str, *overrides: str) -> optuna.Study:
    """A study run in this process to its budget, without held-out scores."""
    parts = components.build(config_with(path, *overrides))
    database = open_storage(url)
    opened = lifecycle.open_study(parts, database)
    loop.work(parts, opened, database)
    return opened


def counted(url: str, name: str) -> list[tuple[str, float | None]]:
    """Candidates that count, by number, and their values."""
    return [(candidate, value) for _, state, candidate, value in rows(url, name) if state == "COMPLETE"]
