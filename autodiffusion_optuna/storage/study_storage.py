"""StudyStorage: Optuna's storage, and what workers need beside it.

The only SQL on Optuna's tables is here, but for the one statement of ``manage`` that renames a study: what Optuna has
no call for, or what must be done in one transaction with a call of Optuna's.
"""

from __future__ import annotations

import functools
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import filelock
import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from autodiffusion_optuna.errors import StorageError
from autodiffusion_optuna.storage.attrs import FAILURE, OWNER

LOCK_SECONDS = 10
"""Seconds to wait for another worker that takes a trial, and after which the database ends one that stopped there."""
DELETE_TRIES = 5
"""Times that a study is deleted to which others still write."""
LOCK_CLASS = 0x61646F70
"""First key of Postgres's advisory locks of ours ("adop"); the second is the study's id."""

T = TypeVar("T")
_log = logging.getLogger("autodiffusion_optuna")

BEATS = sqlalchemy.text(
    "SELECT b.trial_id, b.heartbeat FROM trial_heartbeats b JOIN trials t ON t.trial_id = b.trial_id "
    "WHERE t.study_id = :study AND t.state = 'RUNNING'"
).columns(trial_id=sqlalchemy.Integer, heartbeat=sqlalchemy.DateTime)
HEARTBEATS = sqlalchemy.table("trial_heartbeats", *map(sqlalchemy.column, ("trial_id", "heartbeat")))
STUDIES = sqlalchemy.table("studies", *map(sqlalchemy.column, ("study_id", "study_name")))
TRIALS = sqlalchemy.table("trials", *map(sqlalchemy.column, ("trial_id", "study_id", "state")))
USER_ATTRS = sqlalchemy.table("trial_user_attributes", *map(sqlalchemy.column, ("trial_id", "key", "value_json")))


def id_of_study(study: optuna.Study | Any) -> int:
    """The database's id of a study; private in Optuna, which knows studies by name."""
    return study._study_id


def id_of_trial(trial: optuna.Trial | FrozenTrial) -> int:
    """The database's id of a trial; private in Optuna, which knows trials by number."""
    return trial._trial_id


class Beat(NamedTuple):
    """A worker's last heartbeat. ``silence``: seconds since then by the database's clock.

    ``watched``: seconds for which this process has seen none after it, while the database was there.
    """

    silence: float
    watched: float


def _patient(name: str) -> Callable[..., Any]:
    """A method of Optuna's storage that is called again while the database is away."""

    def call(self: StudyStorage, *args: Any, **kwargs: Any) -> Any:
        return self.until_back(lambda: getattr(self.inner, name)(*args, **kwargs))

    return call


def _while_mine(name: str) -> Callable[..., Any]:
    """A write to a trial of Optuna's storage, which a worker makes only while the trial is its.

    One that was frozen must not change what another one runs by now. The check locks nothing: whoever is frozen while
    it holds a lock stops the others, and most writes of a trial would hold it for longer than they take.
    """

    def call(self: StudyStorage, trial_id: int, *args: Any, **kwargs: Any) -> None:
        write = functools.partial(getattr(self.inner, name), trial_id, *args, **kwargs)
        if self.worker is None:
            self.until_back(write)
            return
        check = sqlalchemy.select(TRIALS.c.trial_id).where(
            _in_state(trial_id, "RUNNING"), _is_of(trial_id, self.worker)
        )
        if not self.until_back(lambda: self.in_one_transaction((check,), write)):
            self.get_trial(trial_id)  # KeyError where the study is deleted
            raise UpdateFinishedTrialError(f"trial {trial_id} is another worker's by now")

    return call


if TYPE_CHECKING:
    _Storage = RDBStorage
else:
    _Storage = type("_Storage", (BaseStorage,), {name: _patient(name) for name in BaseStorage.__abstractmethods__})


class StudyStorage(_Storage):
    """Optuna's RDBStorage, with Optuna's cache before it, for many processes and for days.

    SQLite runs in WAL mode, waits for locks and syncs as WAL needs it; Postgres counts time in UTC. Where the database
    goes away while a study runs (a restart, a lost connection), every call waits up to ``patience`` seconds and is
    made again. A call that was cut off may have been carried out: callers bear that it then happens twice.
    ``worker``: who takes trials and ends them through this object, see ``lease``; None for any other program.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.rdb = RDBStorage(url, **options)
        self.inner = get_storage(self.rdb)
        self.patience = 0.0
        self.worker: str | None = None
        # Last heartbeats of running trials, and when they were first seen by this process's clock.
        self._seen: dict[int, tuple[datetime, float]] = {}
        self._prepare_connections()

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_connections()

    @property
    def engine(self) -> sqlalchemy.Engine:  # type: ignore[override]
        """SQLAlchemy's engine of the database."""
        return self.rdb.engine

    def _prepare_connections(self) -> None:
        listeners = {"sqlite": configure_sqlite, "postgresql": configure_postgres}
        if self.engine.name in listeners:
            sqlalchemy.event.listen(self.engine, "connect", listeners[self.engine.name])
            self.engine.dispose()  # connections opened before the listener would go back without the setting

    def use_wal(self) -> None:
        """Let readers watch a running SQLite study; stays with the file."""
        with self.engine.connect() as connection:
            connection.execute(sqlalchemy.text("PRAGMA journal_mode=WAL"))

    def remove_session(self) -> None:
        """Give this thread's connection back."""
        self.rdb.remove_session()

    def current_name(self, study_id: int) -> str:
        """A study's name as it is now, which Optuna's cache never asks for twice (KeyError where it is deleted)."""
        return self.until_back(lambda: self.rdb.get_study_name_from_id(study_id))

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """A new trial; one that a worker begins is its from the first moment on (KeyError without the study)."""
        if template_trial is not None or self.worker is None:
            return self.until_back(lambda: self.inner.create_new_trial(study_id, template_trial))
        begun = create_trial(state=TrialState.RUNNING, user_attrs={OWNER: self.worker})
        made: list[int] = []
        # SQLite lets others write until the first row is in: the study may have been deleted in between.
        here = STUDIES.update().where(STUDIES.c.study_id == study_id).values(study_name=STUDIES.c.study_name)
        self.until_back(
            lambda: self.in_one_transaction((here,), lambda: made.append(self.inner.create_new_trial(study_id, begun)))
        )
        return made[-1] if made else self.inner.create_new_trial(study_id, begun)  # KeyError

    set_trial_param = _while_mine("set_trial_param")
    set_trial_intermediate_value = _while_mine("set_trial_intermediate_value")
    set_trial_user_attr = _while_mine("set_trial_user_attr")
    set_trial_system_attr = _while_mine("set_trial_system_attr")

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's, but a worker ends only what is still its: else UpdateFinishedTrialError."""
        if self.worker is not None and state.is_finished():
            if not self.end_trial(trial_id, state, values, self.worker):
                raise UpdateFinishedTrialError(f"trial {trial_id} is another worker's by now")
            return True
        if self.worker is not None and state == TrialState.RUNNING:
            return self.until_back(lambda: self._take(trial_id, str(self.worker)))
        return self.until_back(lambda: self.inner.set_trial_state_values(trial_id, state, values))

    def _take(self, trial_id: int, worker: str) -> bool:
        """Begin a waiting trial under its worker's name: in between, nobody could tell whose it is.

        An earlier worker's last heartbeat and its reason to fail go with it. True also where this very call was carried
        out before it was cut off.
        """
        statements = (
            _hold(trial_id, "WAITING"),
            *_set_attr(trial_id, OWNER, worker),
            _forget_attr(trial_id, FAILURE),
            HEARTBEATS.update().where(HEARTBEATS.c.trial_id == trial_id).values(heartbeat=sqlalchemy.func.now()),
        )
        if self.in_one_transaction(statements, lambda: self.rdb.set_trial_state_values(trial_id, TrialState.RUNNING)):
            return True
        now = self.inner.get_trial(trial_id)
        return now.state == TrialState.RUNNING and now.user_attrs.get(OWNER) == worker

    def end_trial(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
        holder: str | None,
        attr: tuple[str, Any] | None = None,
    ) -> bool:
        """End a running trial, or have it wait again, in one transaction with the check that it is ``holder``'s.

        ``holder``: as its user attr names its worker, None for one without. ``attr``: a user attr to write with it.
        False, and nothing is written, where the trial is another's or runs no more; True also where this very call was
        carried out before it was cut off.
        """
        check = _hold(trial_id, "RUNNING").where(_is_of(trial_id, holder))
        statements = (check, *(() if attr is None else _set_attr(trial_id, *attr)))

        def end() -> bool:
            if self.in_one_transaction(statements, lambda: self.rdb.set_trial_state_values(trial_id, state, values)):
                return True
            now = self.inner.get_trial(trial_id)
            return now.state == state and now.user_attrs.get(OWNER) == holder

        return self.until_back(end)

    def in_one_transaction(self, statements: Sequence[sqlalchemy.Executable], call: Callable[[], object]) -> bool:
        """Execute statements, then a call of Optuna's in their transaction; False where the first fits no row.

        For what must not be cut in two, and only that. Optuna's storage has one session a thread, and commits it at
        the end of each call.
        """
        session = self.rdb.scoped_session()
        try:
            for place, statement in enumerate(statements):
                result: Any = session.execute(statement)
                if place == 0 and not (result.first() if result.returns_rows else result.rowcount):
                    session.rollback()
                    return False
            call()
        except BaseException as error:  # also Ctrl-C: the next call would commit what was written so far
            session.rollback()
            if isinstance(error, SQLAlchemyError) and not isinstance(error, IntegrityError):
                raise StorageInternalError("the statement failed") from error
            raise
        return True

    def delete_study(self, study_id: int) -> None:
        """Delete a study, all of it (KeyError). Optuna's own gives up silently where others write to it meanwhile."""
        for _ in range(DELETE_TRIES):
            self.until_back(lambda: self.inner.delete_study(study_id))
            if all(id_of_study(study) != study_id for study in self.get_all_studies()):
                return
        raise StorageError(f"study {study_id} is still being written to; stop its workers, then delete it again")

    def beats(self, study_id: int) -> dict[int, Beat]:
        """The last heartbeat of each running trial that has had one, by trial id."""
        found = self.until_back(lambda: self._read_beats(study_id))
        now, known = time.monotonic(), self._seen
        same = {trial: known[trial] for trial, (at, _) in found.items() if trial in known and known[trial][0] == at}
        seen = {trial: same.get(trial, (at, now)) for trial, (at, _) in found.items()}
        self._seen = seen
        return {trial: Beat(silence, now - seen[trial][1]) for trial, (_, silence) in found.items()}

    def _read_beats(self, study_id: int) -> dict[int, tuple[datetime, float]]:
        """Time and age of each heartbeat. Both are the database's clock's: those of the hosts may differ."""
        try:
            with self.engine.connect() as connection:
                now = connection.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one().replace(tzinfo=None)
                rows = connection.execute(BEATS, {"study": study_id}).all()
        except SQLAlchemyError as error:
            raise StorageInternalError("heartbeats cannot be read") from error
        times = {trial: beat.replace(tzinfo=None) for trial, beat in rows}
        return {trial: (beat, (now - beat).total_seconds()) for trial, beat in times.items()}

    def record_heartbeat(self, trial_id: int) -> None:
        """Say that the trial's worker lives. A beat that the database misses is missed: the next one will do."""
        try:
            self.rdb.record_heartbeat(trial_id)
        except StorageInternalError as error:
            self._seen = {}  # so may those of other workers have been
            _log.debug("a heartbeat was missed: %s", error)

    @contextmanager
    def locked(self, study: optuna.Study, patience: float = LOCK_SECONDS, beginning: bool = False) -> Iterator[None]:
        """Hold the lock under which a study's workers take trials, one after another.

        It saves work and keeps the list of trials tidy; what must hold is checked after it as well. So whoever does
        not get it within ``patience`` seconds goes on without: its holder may be frozen. A killed holder's is free at
        once. ``beginning``: it is held for minutes, in which other studies of the same file are not to wait.
        """
        study_id, release = id_of_study(study), None
        if self.engine.name == "sqlite":
            release = self._file_lock(study_id if beginning else None, patience)
        elif self.engine.name == "postgresql":
            release = self._advisory_lock(study_id, patience)
        try:
            yield
        finally:
            if release is not None:
                release()

    def _file_lock(self, study_id: int | None, patience: float) -> Callable[[], None] | None:
        """The lock of one study, whose file does not stay, or of all studies of the database."""
        name = f"{self.engine.url.database}{'' if study_id is None else f'.{study_id}'}.lock"
        lock = filelock.FileLock(name, timeout=patience)
        try:
            lock.acquire(poll_interval=0.005)
        except (filelock.Timeout, OSError):
            return None

        def release() -> None:
            if study_id is not None:
                Path(name).unlink(missing_ok=True)
            lock.release()

        return release

    def _advisory_lock(self, study_id: int, patience: float) -> Callable[[], None] | None:
        # Where the server goes away meanwhile, all that wait ask again: they must not come back without the lock.
        return self.until_back(lambda: self._wait_for_lock(study_id, patience))

    def _wait_for_lock(self, study_id: int, patience: float) -> Callable[[], None] | None:
        try:
            connection = self.engine.connect()
        except SQLAlchemyError as error:
            raise StorageInternalError("the lock cannot be asked for") from error
        try:
            # A holder that is frozen loses its connection, and with it the lock.
            limits = ("lock_timeout", "idle_in_transaction_session_timeout")
            settings = ", ".join(f"set_config('{name}', '{patience:.0f}s', true)" for name in limits)
            connection.execute(sqlalchemy.text(f"SELECT {settings}"))
            wait = sqlalchemy.text("SELECT pg_advisory_xact_lock(:kind, :study)")
            connection.execute(wait, {"kind": LOCK_CLASS, "study": study_id})
        except SQLAlchemyError as error:
            _let_go(connection)
            if is_away(error):
                raise StorageInternalError("the lock was lost") from error
            return None
        return functools.partial(_let_go, connection)

    def until_back(self, call: Callable[[], T]) -> T:
        """Result of ``call``, made again while the database is away."""
        began: float | None = None
        while True:
            try:
                result = call()
            except StorageInternalError as error:
                now = time.monotonic()
                if not is_away(error.__cause__) or now - (began or now) > self.patience or not self.patience:
                    raise
                if began is None:
                    began = now
                    _log.warning("the database is away; waiting up to %.0f s for it", self.patience)
                self._seen = {}  # workers that could not beat meanwhile were not silent
                self.remove_session()
                time.sleep(0.5)
            else:
                if began is not None:
                    _log.warning("the database is back after %.0f s", time.monotonic() - began)
                return result


NOT_AWAY = ("disk", "readonly", "read-only", "no such table", "no such column", "malformed")
"""Words of SQLite's operational errors that waiting does not fix; another server's may hold its path."""


def is_away(error: BaseException | None) -> bool:
    """Whether a database error is of a lost or refused connection, or of a lock, rather than of what was asked."""
    if isinstance(error, PendingRollbackError):
        return True  # Optuna asks for trials once more, in the session whose connection was lost
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if not isinstance(error, (OperationalError, InterfaceError)):
        return False
    code = getattr(error.orig, "sqlstate", None)
    if isinstance(code, str):
        # Connection exceptions, shutting down or starting up, too many connections, deadlock, serialization.
        return code[:2] in ("08", "57") or code in ("53300", "40P01", "40001")
    text = str(error.orig).lower()
    return "locked" in text or not (isinstance(error.orig, sqlite3.Error) and any(word in text for word in NOT_AWAY))


def _let_go(connection: sqlalchemy.Connection) -> None:
    """End the transaction that holds a lock, also where the server ended it before."""
    try:
        connection.rollback()
    except SQLAlchemyError:
        connection.invalidate()
    finally:
        connection.close()


def _hold(trial_id: int, state: str) -> sqlalchemy.Update:
    """Changes nothing where a trial is in that state; but from then on no other transaction can change the trial."""
    return TRIALS.update().where(_in_state(trial_id, state)).values(state=TRIALS.c.state)


def _in_state(trial_id: int, state: str) -> sqlalchemy.ColumnElement[bool]:
    # The column is an enumeration in Postgres, which does not take a text for it.
    now: sqlalchemy.ColumnClause[Any] = sqlalchemy.literal_column(f"'{state}'")
    return (TRIALS.c.trial_id == trial_id) & (TRIALS.c.state == now)


def _is_of(trial_id: int, holder: str | None) -> sqlalchemy.ColumnElement[bool]:
    """Whether a trial's user attr names this worker, or none."""
    owned = sqlalchemy.exists().where(USER_ATTRS.c.trial_id == trial_id, USER_ATTRS.c.key == OWNER)
    return ~owned if holder is None else owned.where(USER_ATTRS.c.value_json == json.dumps(holder))


def _forget_attr(trial_id: int, key: str) -> sqlalchemy.Executable:
    """A statement that removes a user attr of a trial, if it has it."""
    return USER_ATTRS.delete().where(USER_ATTRS.c.trial_id == trial_id, USER_ATTRS.c.key == key)


def _set_attr(trial_id: int, key: str, value: Any) -> tuple[sqlalchemy.Executable, ...]:
    """Statements that write a user attr of a trial."""
    row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
    return _forget_attr(trial_id, key), USER_ATTRS.insert().values(row)


def configure_sqlite(connection: Any, _record: object) -> None:
    """What every new connection to SQLite is set to."""
    connection.execute("PRAGMA synchronous=NORMAL")  # in WAL mode a killed process loses nothing by it


def configure_postgres(connection: Any, _record: object) -> None:
    """What every new connection to Postgres is set to."""
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
    connection.commit()
