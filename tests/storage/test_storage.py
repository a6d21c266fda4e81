from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import psycopg
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from autodiffusion_optuna.cli import run as run_command
from autodiffusion_optuna.errors import StorageError
from autodiffusion_optuna.storage import database as db
from autodiffusion_optuna.storage import lease
from autodiffusion_optuna.storage import url as urls
from autodiffusion_optuna.storage.attrs import OWNER, RETRIES
from autodiffusion_optuna.storage.study_storage import is_away


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
    monkeypatch.delenv(urls.ENVIRONMENT, raising=False)
    assert urls.storage_url(given) == expected


def test_the_environment_names_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(urls.ENVIRONMENT, "theirs.db")
    assert urls.storage_url(None) == "sqlite:///theirs.db"
    assert urls.storage_url("mine.db") == "sqlite:///mine.db"


def test_sqlite_is_opened_in_wal_mode(tmp_path: Path) -> None:
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    with database.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() == 1


def test_looking_at_a_database_that_is_not_there_creates_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no database at"):
        db.open_storage(f"sqlite:///{tmp_path}/a.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_only_created_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.db").touch()
    url = f"sqlite:///{tmp_path}/a.db"
    assert db.is_empty(url)
    assert db.open_storage(url).get_all_studies() == []
    assert not db.is_empty(url)


def test_many_may_open_a_database_at_the_moment_it_is_made(tmp_path: Path) -> None:
    """Also those that only look: a launcher waits like this for its first worker."""
    url = f"sqlite:///{tmp_path}/a.db"
    together = threading.Barrier(6)

    def look(place: int) -> int:
        together.wait()
        if place % 2:
            return len(db.open_storage(url).get_all_studies())
        return 0 if db.is_empty(url) else len(db.open_storage(url, create=False).get_all_studies())

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(look, range(6))) == [0] * 6


def test_a_put_back_trial_keeps_its_number_and_parameters(tmp_path: Path) -> None:
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(study_name="x", storage=database)
    first = study.ask()
    value = first.suggest_int("n", 0, 10**6)
    first.set_user_attr(OWNER, lease.owner())
    lease.release(database, first._trial_id)
    again = study.ask()
    assert again.number == first.number
    assert again.suggest_int("n", 0, 10**6) == value


def test_this_process_is_alive_and_a_reused_pid_is_not_it() -> None:
    assert not lease.is_dead(lease.owner())
    host, pid, started = lease.owner().rsplit("/", 2)
    assert lease.is_dead(f"{host}/{pid}/{int(started) + 1}")
    assert not lease.is_dead(f"another-host/{pid}/{started}")
    assert int(pid) == os.getpid()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:secret@host/db",
        "postgresql+psycopg://host/db?user=me&password=secret",
        "postgresql+psycopg://host/db?user=me&PASSWORD=secret",
        "postgresql+psycopg://host/db?sslpassword=secret&sslmode=require",
        "postgresql+psycopg://me:secret@host:port/db?password=secret",
        "postgresql+psycopg://me:se/secret@host/db",
        "postgresql+psycopg://me:pa@secret@host/db",
        "broken//me:secret@host",
    ],
)
def test_no_secret_of_a_url_is_shown(url: str) -> None:
    shown = urls.hide_password(url)
    assert "secret" not in shown
    assert "***" in shown
    assert "host" in shown
    assert urls.hide_password(shown) == shown


def test_the_command_that_resumes_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["adopt", "run", "--study=x", "--storage=postgresql://me:secret@h/db?password=secret", "--set", "name=a"]
    monkeypatch.setattr("sys.argv", words)
    shown = run_command.resume_command()
    assert "secret" not in shown
    assert shown.startswith("adopt run --study=x '--storage=postgresql://me:***@h/db?password=***'")
    assert shown.endswith("--set name=a")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql+psycopg://me:secret@host:port/db", "is no database URL"),
        ("postgresql+psycopg://me:pa@secret@host/db", "write it there as %40"),
        ("sqlite:///a.db?timeout=soon", "timeout"),
        ("sqlite:///a.db?cached_statements=few", "few"),
    ],
)
def test_urls_that_cannot_be_read(url: str, expected: str) -> None:
    with pytest.raises(StorageError, match=expected) as refused:
        db.open_storage(url)
    assert "secret" not in str(refused.value)


def test_braces_in_a_path_mean_themselves(tmp_path: Path) -> None:
    optuna.create_study(study_name="x", storage=db.open_storage(f"sqlite:///{tmp_path}/a{{b}}.db"))
    assert (tmp_path / "a{b}.db").exists()


def test_a_server_that_falls_silent_is_noticed() -> None:
    def options(url: str) -> dict[str, object]:
        made: dict[str, object] = urls.engine_options(make_url(url))["connect_args"]
        return made

    assert options("postgresql+psycopg://host/db") == {**urls.LIBPQ, "prepare_threshold": None}
    assert options("postgresql+psycopg2://host/db") == urls.LIBPQ
    assert options("postgresql+psycopg://host/db?prepare_threshold=5")["prepare_threshold"] == 5
    assert "connect_timeout" not in options("postgresql+psycopg://host/db?connect_timeout=3")
    assert options("mysql+pymysql://host/db") == {}


def test_what_waiting_mends() -> None:
    def error(original: Exception) -> OperationalError:
        return OperationalError("SELECT 1", {}, original)

    assert is_away(error(psycopg.OperationalError("connection to /disk1/readonly/.s.PGSQL failed: refused")))
    assert is_away(error(sqlite3.OperationalError("database is locked")))
    assert not is_away(error(sqlite3.OperationalError("disk I/O error")))
    assert not is_away(error(sqlite3.OperationalError("attempt to write a readonly database")))


def waiting_trial(database: db.StudyStorage) -> tuple[optuna.Study, int]:
    study = optuna.create_study(study_name="x", storage=database)
    study.enqueue_trial({"n": 1})
    return study, study.trials[0]._trial_id


def take(database: db.StudyStorage, trial: int, worker: str) -> bool:
    """Begin a waiting trial as that worker would."""
    database.worker = worker
    taken: bool = database.set_trial_state_values(trial, TrialState.RUNNING)
    database.record_heartbeat(trial)
    database.worker = None
    return taken


def test_a_waiting_trial_is_taken_once(tmp_path: Path) -> None:
    database, other = (db.open_storage(f"sqlite:///{tmp_path}/a.db") for _ in range(2))
    study, trial = waiting_trial(database)
    assert take(other, trial, "elsewhere/1/1")
    assert not take(database, trial, lease.owner())
    taken = study.trials[0]
    assert taken.state == TrialState.RUNNING
    assert taken.user_attrs[OWNER] == "elsewhere/1/1"
    assert other.beats(study._study_id).keys() == {trial}


def test_half_of_a_transaction_that_was_stopped_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a write: the next call would commit what was written before it."""
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study, trial = waiting_trial(database)
    with monkeypatch.context() as stopped:
        stopped.setattr(database.rdb, "set_trial_state_values", fails(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            take(database, trial, "elsewhere/1/1")
    assert study.trials[0].state == TrialState.WAITING
    assert OWNER not in study.trials[0].user_attrs


def test_a_trial_that_another_took_meanwhile_is_not_taken_back(tmp_path: Path) -> None:
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study, trial = waiting_trial(database)
    take(database, trial, f"{lease.host()}/999999999/1")
    seen = study.trials[0]
    database.set_trial_user_attr(trial, OWNER, "elsewhere/1/1")
    assert not lease.take_back(database, seen, "died")
    assert study.trials[0].state == TrialState.RUNNING
    assert RETRIES not in study.trials[0].user_attrs
    lease.release(database, trial)  # nor given back by one whose it is not
    assert study.trials[0].state == TrialState.RUNNING


def age_heartbeats(database: db.StudyStorage) -> None:
    with database.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'"))


def test_silence_counts_while_it_is_watched(tmp_path: Path) -> None:
    """A database that was away for longer than the grace makes no worker dead: none could beat."""
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study, trial = waiting_trial(database)
    take(database, trial, "elsewhere/1/1")
    age_heartbeats(database)
    assert lease.reclaim(study, database, study.trials, 0.4) == []
    time.sleep(0.3)
    database.until_back(iter_of(StorageInternalError("gone"), None))  # away for a moment
    assert lease.reclaim(study, database, study.trials, 0.4) == []
    time.sleep(0.3)
    assert lease.reclaim(study, database, study.trials, 0.4) == [0]


def test_an_outage_that_only_the_heart_meets_silences_no_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study, trial = waiting_trial(database)
    take(database, trial, "elsewhere/1/1")
    age_heartbeats(database)
    assert lease.reclaim(study, database, study.trials, 0.4) == []
    time.sleep(0.3)
    with monkeypatch.context() as away:
        away.setattr(optuna.storages.RDBStorage, "record_heartbeat", fails(StorageInternalError("gone")))
        database.record_heartbeat(trial)
    assert lease.reclaim(study, database, study.trials, 0.4) == []


def fails(error: BaseException) -> Callable[..., None]:
    def call(*args: object) -> None:
        raise error

    return call


def test_a_heart_beats_on_after_any_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study, trial = waiting_trial(database)
    beats: list[int] = []

    def beat(trial: int) -> None:
        beats.append(trial)
        raise AssertionError("the row was taken away")

    monkeypatch.setattr(database, "record_heartbeat", beat)
    with lease.Heartbeat(database, 0.02) as beating, beating.of(lease.Lease(optuna.Trial(study, trial), trial)):
        time.sleep(0.3)
    assert len(beats) > 2


def test_a_taken_trial_keeps_the_row_of_its_heartbeat(tmp_path: Path) -> None:
    """The heart of the worker that had it may be waiting for that row."""
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    _, trial = waiting_trial(database)

    def row() -> tuple[int, str]:
        with database.engine.connect() as connection:
            query = "SELECT trial_heartbeat_id, heartbeat FROM trial_heartbeats"
            (found,) = connection.execute(sqlalchemy.text(query)).all()
        return found[0], str(found[1])

    take(database, trial, lease.owner())
    first = row()[0]
    age_heartbeats(database)
    lease.release(database, trial)
    take(database, trial, "elsewhere/1/1")
    assert row()[0] == first
    assert not row()[1].startswith("2020")


def iter_of(error: StorageInternalError, answer: object) -> Callable[[], object]:
    """A call that fails the first time as if the database were away."""
    error.__cause__ = OperationalError("SELECT 1", {}, sqlite3.OperationalError("database is locked"))
    outcomes = iter([error, answer])

    def call() -> object:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return call


def test_a_worker_of_an_earlier_boot_is_dead_sooner(tmp_path: Path) -> None:
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study, trial = waiting_trial(database)
    earlier = lease.host().rpartition("-")[0] + "-00000000"
    assert lease.ran_here_before(f"{earlier}/1/1")
    assert not lease.ran_here_before(lease.owner())
    assert not lease.ran_here_before("elsewhere/1/1")
    take(database, trial, f"{earlier}/1/1")
    assert lease.reclaim(study, database, study.trials, 60) == []  # a copy of this machine may beat still
    age_heartbeats(database)
    assert lease.reclaim(study, database, study.trials, 60) == [0]


def test_a_study_that_was_deleted_is_one_line(tmp_path: Path) -> None:
    database = db.open_storage(f"sqlite:///{tmp_path}/a.db")
    study, trial = waiting_trial(database)
    database.delete_study(study._study_id)
    for call in (lambda: database.create_new_trial(study._study_id), lambda: database.get_trial(trial)):
        with pytest.raises(KeyError) as gone:
            call()
        assert "deleted" in (db.failure(gone.value) or "")
    assert db.failure(KeyError("another")) is None
    with database.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT COUNT(*) FROM trials")).scalar() == 0
