"""open_storage(url): Optuna's storage in a database, made to survive."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models  # private: names of the tables, and what a KeyError says
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from autodiffusion_optuna.errors import StorageError, program
from autodiffusion_optuna.storage.study_storage import StudyStorage, is_away
from autodiffusion_optuna.storage.url import engine_options, escaped, hide_password, parse_url, sqlite_path

PATIENCE = 600.0
"""Seconds to wait for a database that went away while a study runs."""
OPENING = 120.0
"""Seconds to wait for one that has not answered yet, where it says that it will; see ``_is_coming``."""
MAKE_TRIES = 8
"""Times that tables are made, or looked for, while another process makes them."""
COMING = (
    "starting up", "shutting down", "not yet accepting", "recovery mode", "terminating connection", "too many clients",
    "connection slots", "closed the connection", "reset by peer", "eof detected", "connection is lost",
)  # fmt: skip
"""Words of a server that is there, or was a moment ago; drivers give no code for what happens while they connect."""

T = TypeVar("T")
_log = logging.getLogger("autodiffusion_optuna")


def _is_coming(error: BaseException | None) -> bool:
    """Whether a database that is being opened for the first time is about to come back, or a wrong one was named.

    One that refuses the connection, or the password, is the latter.
    """
    if not isinstance(error, DBAPIError):
        return False
    text = str(error.orig).lower()
    away = isinstance(getattr(error.orig, "sqlstate", None), str) and is_away(error)
    return error.connection_invalidated or away or any(words in text for words in COMING)


def _opened(make: Callable[[], T], url: URL, known: bool) -> T:
    """Result of ``make``, which opens the database at ``url``; made again while that is coming back.

    ``known``: whether it has answered before; it is then waited for whatever it says. SQLite waits by itself.
    """
    waits = is_away if known else _is_coming
    patience, began = PATIENCE if known else OPENING, time.monotonic()
    warned = False
    while True:
        try:
            return make()
        except (SQLAlchemyError, StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            late = time.monotonic() - began > patience
            if late or url.get_backend_name() == "sqlite" or not waits(cause):
                raise
        if not warned:
            _log.warning("the database is away; waiting up to %.0f s for it", patience)
            warned = True
        time.sleep(0.5)


def failure(error: BaseException) -> str | None:
    """One line for a database that failed while a study ran: full, read-only, locked or gone; None for other errors."""
    if isinstance(error, KeyError) and error.args == (models.NOT_FOUND_MSG,):
        return "the study was deleted while it ran; start it again with the same command"
    if not isinstance(error, (StorageInternalError, SQLAlchemyError)):
        return None
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
    return f"the database failed: {reason}; what is finished is kept: fix the cause and run the command again"


def open_storage(url: str, *, create: bool = True, known: bool = False) -> StudyStorage:
    """Optuna storage at ``url``: SQLite in WAL mode with a busy timeout, or any database SQLAlchemy knows.

    A database that does not answer now is an error, but for a server that is starting or ends connections; one that
    goes away later is waited for, and with ``known`` True, for one that has answered before, also now. With ``create``
    False a database without studies is an error, so that reading never writes.
    Raises StorageError where the URL does not parse, or the database does not open or is another program's.
    """
    parsed = parse_url(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what the database says is said here, in one line
    try:
        check_place(url, create=create)
        storage = _opened(lambda: _open(url, create), parsed, known)
        if parsed.get_backend_name() == "sqlite" and create:
            storage.use_wal()
    # RuntimeError: Optuna's word for tables of another version.
    except (SQLAlchemyError, OptunaError, ImportError, OSError, RuntimeError) as error:
        raise StorageError(_reason(url, error)) from None
    storage.patience = PATIENCE
    return storage


def _open(url: str, create: bool) -> StudyStorage:
    parsed = parse_url(url)
    _check_tables(parsed, create)
    options = engine_options(parsed)
    return _once_made(lambda: StudyStorage(escaped(url), engine_kwargs=options, skip_table_creation=not create))


def _once_made(make: Callable[[], T]) -> T:
    """Result of ``make``, tried again where another process makes the same tables at this moment."""
    for attempt in range(1, MAKE_TRIES):
        try:
            return make()
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if not (isinstance(error, IntegrityError) or "already exists" in str(error.orig)):
                raise
            time.sleep(0.2 * attempt)
    return make()


def is_empty(url: str, *, known: bool = False) -> bool:
    """Whether there is no database at ``url`` yet, or one without tables; looking never creates one.

    ``known`` as in ``open_storage``. Raises StorageError where the URL does not parse or the database does not open.
    """
    parsed, path = parse_url(url), sqlite_path(url)
    if path is not None and not path.exists():
        return True
    try:
        if path is not None:
            check_place(url, create=False)
        tables = _opened(lambda: _tables(parsed), parsed, known)
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise StorageError(_reason(url, error)) from None
    return not tables or _being_made(tables)


def _being_made(tables: set[str]) -> bool:
    """Whether these are some of Optuna's tables, not yet stamped with their version: a process is at it."""
    return tables <= set(models.BaseModel.metadata.tables)


def _tables(parsed: URL) -> set[str]:
    engine = sqlalchemy.create_engine(parsed, **engine_options(parsed))
    try:
        return set(sqlalchemy.inspect(engine).get_table_names())
    finally:
        engine.dispose()


def _check_tables(parsed: URL, create: bool) -> None:
    """StorageError where Optuna's tables would be put among another program's, or are looked for and not there."""
    tables = _tables(parsed)
    half = _being_made(tables)  # also where whoever made them was killed at it: the next one makes the rest
    if ("studies" in tables and (create or not half)) or (create and half):
        return
    what = "holds no studies" if half else f"holds tables of another program ({min(tables)}, …)"
    shown = hide_password(parsed.render_as_string(hide_password=False))
    raise StorageError(f"database {shown!r} {what}; give another with --storage")


def check_place(url: str, *, create: bool = True) -> None:
    """StorageError where there is no SQLite file at ``url``, or with ``create`` none could be made or written there.

    Nothing is created. Servers are not asked.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        return
    if not parsed.database or parsed.database == ":memory:":
        raise StorageError("storage sqlite in memory would forget the study; give a file: sqlite:///FILE.db")
    path = Path(parsed.database)
    if path.is_dir():
        raise StorageError(f"storage {str(path)!r} is a folder; give a file: sqlite:///{path}/adopt.db")
    if path.exists():
        if create and not (os.access(path, os.W_OK) and _writable(path.parent)):
            raise StorageError(f"storage {str(path)!r} is read-only; make the file and its folder writable")
        # The file is never opened here: closing it would drop the locks of this process's own connections to it
        # (https://sqlite.org/howtocorrupt.html, section 2.2), and the next worker to end would take away their log.
    elif not create:
        raise StorageError(f"no database at {str(path)!r}; start a study with `{program()} run`, or give --storage URL")
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


def _reason(url: str, error: Exception) -> str:
    detail = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    if "file is not a database" in detail:
        return f"storage {str(sqlite_path(url))!r} is not a SQLite database; give another file"
    if "psycopg" in detail and isinstance(error, ImportError):
        return 'Postgres needs the package psycopg; pip install "autodiffusion-optuna[postgres]"'
    if isinstance(error, RuntimeError):  # Optuna's word for tables of another version
        return (
            f"storage {hide_password(url)!r} was made by another version of Optuna, or this one is too old for it; "
            f"keep a copy, then run: {program()} storage upgrade --storage {shlex.quote(hide_password(url))}"
        )
    return f"cannot open storage {hide_password(url)!r}: {detail}; check the URL, or start the server"


def upgrade_storage(url: str) -> str:
    """Bring the tables at ``url`` to the version that the installed Optuna needs; what was done, one line.

    Raises StorageError where there is no database of Optuna's.
    """
    parsed = parse_url(url)
    try:
        check_place(url, create=False)
        _check_tables(parsed, create=False)
        storage = RDBStorage(
            escaped(url), engine_options(parsed), skip_compatibility_check=True, skip_table_creation=True
        )
        before, needed = storage.get_current_version(), storage.get_head_version()
        if before == needed:
            return f"database {hide_password(url)!r} has version {needed} already"
        storage.upgrade()
    except (SQLAlchemyError, OptunaError, ImportError, OSError, RuntimeError) as error:
        raise StorageError(_reason(url, error)) from None
    return f"database {hide_password(url)!r} upgraded from version {before} to {needed}"
