"""Worker processes and the database servers under them: begun, frozen, ended, and what they leave behind."""

from __future__ import annotations

import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from autodiffusion_optuna.storage.attrs import CANDIDATE, CONFIG, FAILURE, GIVEN_UP, OWNER
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.storage.study_storage import StudyStorage
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.storage.url import sqlite_path
from autodiffusion_optuna.workers.worker import Job
from studies import config_with


def start(folder: Path, url: str, *settings: str) -> subprocess.Popen[bytes]:
    """One worker process; its study must have begun."""
    config = config_with(folder / "quick.toml", *settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autodiffusion_optuna.workers.worker"]
    worker = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert worker.stdin is not None
    worker.stdin.write(Job(config=config, url=url, workers=4).model_dump_json().encode() + b"\n")
    worker.stdin.flush()
    return worker


def end(worker: subprocess.Popen[bytes], seconds: float = 300.0) -> str:
    """Wait until it has done its part; what it said. Its input stays open: it is what keeps it going."""
    code = worker.wait(seconds)
    assert worker.stderr is not None
    said = worker.stderr.read().decode()
    assert code == 0, said
    return said


def can_write(url: str) -> bool:
    """Whether a SQLite database takes writes: not while a process that was stopped in the middle of one holds it."""
    file = sqlite_path(url)
    if file is None:
        return True
    with closing(sqlite3.connect(file, timeout=0.2)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
    return True


def freeze(worker: subprocess.Popen[bytes], found: optuna.Study, url: str) -> int:
    """Stop a worker in the middle of a trial's evaluation; that trial's number. ``url``: of the database."""
    wait_for(lambda: count_finished(found) >= 2)
    while True:
        worker.send_signal(signal.SIGSTOP)
        held = found.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if held and can_write(url):
            return held[0].number
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.05)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def check_whole(url: str, name: str, trials: int, *, cut_off: bool = False) -> None:
    """Exactly ``trials`` finished, no two alike, none left over.

    ``cut_off``: trials may have been begun twice, in calls that were cut off after they were carried out; the second
    ones are given up at once.
    """
    found = load_study(open_storage(url), name).get_trials(deepcopy=False)
    given_up = [t for t in found if t.user_attrs.get(FAILURE, "").startswith(GIVEN_UP)]
    failed = len(given_up) if cut_off else 0
    states = [t.state for t in found]
    assert states.count(TrialState.COMPLETE) == trials
    assert states.count(TrialState.FAIL) == failed
    assert len(states) == trials + failed
    keys = [t.user_attrs[CANDIDATE] for t in found if t.state == TrialState.COMPLETE]
    assert len(set(keys)) == trials
    assert sorted(t.number for t in found) == list(range(len(found)))


def names(url: str) -> set[str]:
    """Owners of the trials of the study, if it has begun: its name is there before its configuration."""
    database: StudyStorage = open_storage(url)
    begun = any(s.study_name == "quick" and CONFIG in s.user_attrs for s in database.get_all_studies())
    trials = load_study(database, "quick").get_trials(deepcopy=False) if begun else []
    return {t.user_attrs[OWNER] for t in trials if OWNER in t.user_attrs}


def control(server: Any, action: str) -> None:
    """Stop or start a server under its clients, with the options that it was started with."""
    folder = Path(server.pgdata)
    program, *options = shlex.split((folder / "postmaster.opts").read_text())
    extra = ["-m", "immediate"] if action == "stop" else ["-o", shlex.join(options[2:])]  # without -D FOLDER
    command = [
        str(Path(program).with_name("pg_ctl")),
        "-D",
        str(folder),
        "-w",
        "-l",
        str(folder / "log"),
        *extra,
        action,
    ]
    subprocess.run(command, check=True, capture_output=True, **as_owner(folder))


def as_owner(folder: Path) -> dict[str, Any]:
    """Postgres does not run as root: act as whoever its files belong to."""
    owner = folder.stat()
    return {"user": owner.st_uid, "group": owner.st_gid} if os.getuid() == 0 != owner.st_uid else {}
