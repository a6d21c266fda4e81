"""open_storage(url): Optuna's RDBStorage, made to survive; and what a killed worker leaves behind."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from autodiffusion_optuna.errors import StorageError

DEFAULT_URL = "sqlite:///adopt.db"
ENVIRONMENT = "ADOPT_STORAGE"
BUSY_TIMEOUT = 60
"""Seconds to wait for another process's SQLite lock."""
OWNER = "worker"
"""Trial user attr: who runs the trial, as ``owner()`` writes it."""
RETRIES = "retries"
"""Trial user attr: how often the trial was taken back from a dead worker."""
FAILURE = "failure"
"""Trial user attr: why the trial failed, one line."""
MAX_RETRIES = 10
CLAIM_SECONDS = 5.0
"""A worker that lives writes its name on a new trial well within this time."""


def storage_url(given: str | None) -> str:
    """The database URL to use: the one given, else ``ADOPT_STORAGE``, else ``adopt.db`` in the current folder.

    A bare path is a SQLite file; ``postgresql://`` gets the psycopg 3 driver.
    """
    text = given or os.environ.get(ENVIRONMENT) or DEFAULT_URL
    if "://" not in text:
        # A drive letter or a word with a colon would be a broken URL rather than a file's name.
        if not text.strip() or ":" in text:
            raise StorageError(
                f"storage {text!r} is no database URL; "
                "use sqlite:///FILE.db, a path, or postgresql+psycopg://USER@HOST/DB"
            )
        return f"sqlite:///{text}"
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", text)


def sqlite_path(url: str) -> Path | None:
    """File of a SQLite URL; None for other databases."""
    parsed = _parse(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def hide_password(url: str) -> str:
    """The URL with its password starred, for messages."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return re.sub(r"//[^@/]*@", "//***@", url)


def storage_option(url: str) -> str:
    """``" --storage URL"`` as a shown command needs it, its password starred; empty for the default database."""
    return "" if url == storage_url(None) else f" --storage {shlex.quote(hide_password(url))}"


def open_storage(url: str, *, create: bool = True) -> RDBStorage:
    """Optuna storage at ``url``: SQLite in WAL mode with a busy timeout, or any database SQLAlchemy knows.

    With ``create`` False a database without studies is an error, so that reading never writes.
    Raises StorageError where the URL does not parse, or the database does not open or is another program's.
    """
    parsed = _parse(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if sqlite:
            _check_sqlite(parsed, create)
        _check_tables(parsed, create)
        storage = RDBStorage(url, engine_kwargs=_engine_options(parsed), skip_table_creation=not create)
        if sqlite and create:
            _set_pragmas(storage.engine)
    # RuntimeError: Optuna's word for tables of another version.
    except (SQLAlchemyError, OptunaError, ImportError, OSError, RuntimeError) as error:
        raise StorageError(_reason(url, error)) from None
    return storage


def is_empty(url: str) -> bool:
    """Whether there is no database at ``url`` yet, or one without tables; looking never creates one.

    Raises StorageError where the URL does not parse or the database does not open.
    """
    parsed = _parse(url)
    path = sqlite_path(url)
    if path is not None and not path.exists():
        return True
    try:
        if path is not None:
            _check_sqlite(parsed, create=False)
        return not _tables(parsed)
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise StorageError(_reason(url, error)) from None


def _tables(parsed: URL) -> set[str]:
    engine = sqlalchemy.create_engine(parsed, **_engine_options(parsed))
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def _check_tables(parsed: URL, create: bool) -> None:
    """StorageError where Optuna's tables would be put among another program's, or are looked for and not there."""
    tables = _tables(parsed)
    if "studies" in tables or (create and not tables):
        return
    what = f"holds tables of another program ({min(tables)}, …)" if tables else "holds no studies"
    shown = parsed.render_as_string(hide_password=True)
    raise StorageError(f"database {shown!r} {what}; give another with --storage")


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, SQLAlchemyError, ImportError, ValueError) as error:
        raise StorageError(
            f"storage {hide_password(url)!r} is no database URL ({str(error).splitlines()[0]}); "
            "use sqlite:///FILE.db or postgresql+psycopg://USER@HOST/DB"
        ) from None
    return parsed


def _check_sqlite(url: URL, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise StorageError("storage sqlite in memory would forget the study; give a file: sqlite:///FILE.db")
    path = Path(url.database)
    if path.is_dir():
        raise StorageError(f"storage {str(path)!r} is a folder; give a file: sqlite:///{path}/adopt.db")
    if path.exists():
        if create and not (os.access(path, os.W_OK) and _writable(path.parent)):
            raise StorageError(f"storage {str(path)!r} is read-only; make the file and its folder writable")
        with path.open("rb") as file:
            head = file.read(16)
        if head and head != b"SQLite format 3\x00":
            raise StorageError(f"storage {str(path)!r} is not a SQLite database; give another file")
    elif not create:
        raise StorageError(f"no database at {str(path)!r}; start a study with `adopt run`, or give --storage URL")
    elif not path.parent.is_dir():
        raise StorageError(f"storage folder {str(path.parent)!r} does not exist; create it or give --storage URL")
    elif not _writable(path.parent):
        raise StorageError(f"storage folder {str(path.parent)!r} is read-only; give --storage URL of another place")


def _writable(folder: Path) -> bool:
    """Whether a file can be created there. Tried rather than asked: root is told yes on a read-only mount."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _engine_options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_TIMEOUT}}
    return {"pool_pre_ping": True}


def _set_pragmas(engine: sqlalchemy.Engine) -> None:
    """WAL lets readers watch a running study; NORMAL loses nothing when a process is killed."""

    def on_connect(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous=NORMAL")

    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("PRAGMA journal_mode=WAL"))
    sqlalchemy.event.listen(engine, "connect", on_connect)
    engine.dispose()  # connections opened before the listener go back without the setting


def _reason(url: str, error: Exception) -> str:
    detail = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    return f"cannot open storage {hide_password(url)!r}: {detail}; check the URL, or start the server"


def owner() -> str:
    """This process's name on its trials: host, process id and the process's start time."""
    return f"{os.uname().nodename}/{os.getpid()}/{_started(os.getpid())}"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot ('' where it does not run): pids are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return _running_without_proc(pid)


def _running_without_proc(pid: int) -> str:
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "0"


def is_dead(name: str) -> bool:
    """Whether the worker of that name ran on this host and runs no more."""
    host, pid, started = name.rsplit("/", 2)
    return host == os.uname().nodename and _started(int(pid)) != started


def reclaim(storage: RDBStorage, study_name: str) -> list[int]:
    """Put trials of dead workers back in the queue under their own numbers, so that nothing shifts.

    Returns the numbers taken back. A trial that was taken back ``MAX_RETRIES`` times is failed, with the
    reason in its user attrs, since it may be what kills its worker. Trials of workers on other hosts stay.
    """
    study_id = storage.get_study_id_from_name(study_name)
    taken = []
    for trial in storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        if not _abandoned(storage, trial_id):
            continue
        retries = int(trial.user_attrs.get(RETRIES, 0)) + 1
        storage.set_trial_user_attr(trial_id, RETRIES, retries)
        if retries > MAX_RETRIES:
            storage.set_trial_user_attr(trial_id, FAILURE, f"its worker died {retries} times")
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        else:
            storage.set_trial_state_values(trial_id, TrialState.WAITING)
            taken.append(trial.number)
    return taken


def _abandoned(storage: RDBStorage, trial_id: int) -> bool:
    trial = storage.get_trial(trial_id)
    if OWNER not in trial.user_attrs and trial.datetime_start is not None:
        # Created a moment ago by a worker that lives, or left by one that was killed before it wrote its name.
        age = (datetime.now() - trial.datetime_start).total_seconds()
        time.sleep(min(max(CLAIM_SECONDS - age, 0.0), CLAIM_SECONDS))
        trial = storage.get_trial(trial_id)
    name = trial.user_attrs.get(OWNER)
    return trial.state == TrialState.RUNNING and (name is None or is_dead(name))


def put_back(storage: RDBStorage, study_name: str, number: int) -> None:
    """RUNNING -> WAITING for one trial of this process, keeping its number and the parameters it has."""
    study_id = storage.get_study_id_from_name(study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    if storage.get_trial(trial_id).state == TrialState.RUNNING:
        storage.set_trial_state_values(trial_id, TrialState.WAITING)


def upgrade_storage(url: str) -> str:
    """Bring the tables at ``url`` to the version that the installed Optuna needs; what was done, one line.

    Raises StorageError where there is no database of Optuna's.
    """
    parsed = _parse(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            _check_sqlite(parsed, create=False)
        _check_tables(parsed, create=False)
        storage = RDBStorage(url, _engine_options(parsed), skip_compatibility_check=True, skip_table_creation=True)
        before, needed = storage.get_current_version(), storage.get_head_version()
        if before == needed:
            return f"database {hide_password(url)!r} has version {needed} already"
        storage.upgrade()
    except (SQLAlchemyError, OptunaError, ImportError, OSError, RuntimeError) as error:
        raise StorageError(_reason(url, error)) from None
    return f"database {hide_password(url)!r} upgraded from version {before} to {needed}"
