from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from autodiffusion_optuna import claims
from autodiffusion_optuna import storage as s
from autodiffusion_optuna.errors import StorageError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "sqlite:///adopt.db"),
        ("my.db", "sqlite:///my.db"),
        ("/data/my.db", "sqlite:////data/my.db"),
        ("sqlite:///my.db", "sqlite:///my.db"),
        ("postgres://me@host/db", "postgresql+psycopg://me@host/db"),
        ("postgresql://me@host/db", "postgresql+psycopg://me@host/db"),
        ("postgresql+psycopg://me@host/db", "postgresql+psycopg://me@host/db"),
    ],
)
def test_what_a_storage_argument_means(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(s.ENVIRONMENT, raising=False)
    assert s.storage_url(given) == expected


def test_the_environment_names_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(s.ENVIRONMENT, "theirs.db")
    assert s.storage_url(None) == "sqlite:///theirs.db"
    assert s.storage_url("mine.db") == "sqlite:///mine.db"


def test_passwords_are_hidden() -> None:
    assert "secret" not in s.hide_password("postgresql+psycopg://me:secret@host/db")
    assert "secret" not in s.hide_password("broken//me:secret@host")


def test_sqlite_is_opened_in_wal_mode(tmp_path: Path) -> None:
    database = s.open_storage(f"sqlite:///{tmp_path}/a.db")
    with database.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() == 1


def test_looking_at_a_database_that_is_not_there_creates_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no database at"):
        s.open_storage(f"sqlite:///{tmp_path}/a.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_only_created_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.db").touch()
    url = f"sqlite:///{tmp_path}/a.db"
    assert s.is_empty(url)
    assert s.open_storage(url).get_all_studies() == []
    assert not s.is_empty(url)


def test_many_may_open_a_database_at_the_moment_it_is_made(tmp_path: Path) -> None:
    """Also those that only look: a launcher waits like this for its first worker."""
    url = f"sqlite:///{tmp_path}/a.db"
    together = threading.Barrier(6)

    def look(place: int) -> int:
        together.wait()
        if place % 2:
            return len(s.open_storage(url).get_all_studies())
        return 0 if s.is_empty(url) else len(s.open_storage(url, create=False).get_all_studies())

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(look, range(6))) == [0] * 6


def test_a_put_back_trial_keeps_its_number_and_parameters(tmp_path: Path) -> None:
    database = s.open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(study_name="x", storage=database)
    first = study.ask()
    value = first.suggest_int("n", 0, 10**6)
    first.set_user_attr(claims.OWNER, claims.owner())
    claims.put_back(database, first._trial_id)
    again = study.ask()
    assert again.number == first.number
    assert again.suggest_int("n", 0, 10**6) == value


def test_this_process_is_alive_and_a_reused_pid_is_not_it() -> None:
    assert not claims.is_dead(claims.owner())
    host, pid, started = claims.owner().rsplit("/", 2)
    assert claims.is_dead(f"{host}/{pid}/{int(started) + 1}")
    assert not claims.is_dead(f"another-host/{pid}/{started}")
    assert int(pid) == os.getpid()
