"""Whole trials as rows of Optuna's tables, read and written with few statements.

Optuna's own code goes through one object per row, and asks twice per parameter when a trial begins: a tenth of a second
for a trial of 30 parameters. The rows are the same. Statements are made once, here, and executed on a connection:
making one costs more than SQLite needs to carry it out.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, bindparam, func, select

AT_ONCE = 500
"""Trials asked for in one statement: databases limit the number of its parameters."""
Value = models.TrialValueModel
Intermediate = models.TrialIntermediateValueModel

TRIALS: Table = models.TrialModel.__table__
PARAMS: Table = models.TrialParamModel.__table__
VALUES: Table = Value.__table__
STEPS: Table = Intermediate.__table__
USER_ATTRS: Table = models.TrialUserAttributeModel.__table__
SYSTEM_ATTRS: Table = models.TrialSystemAttributeModel.__table__
HEARTBEATS: Table = models.TrialHeartbeatModel.__table__

# Names of bound parameters must not be those of columns.
_THIS = TRIALS.c.trial_id == bindparam("this")
_INSERTS = {
    table.name: sqlalchemy.insert(table)
    for table in (TRIALS, PARAMS, VALUES, STEPS, USER_ATTRS, SYSTEM_ATTRS, HEARTBEATS)
}
_CHILDREN = {
    table.name: select(table).where(table.c.trial_id.in_(bindparam("ids", expanding=True))).order_by(table.c[order])
    for table, order in (
        (PARAMS, "param_id"),
        (VALUES, "objective"),
        (USER_ATTRS, "trial_user_attribute_id"),
        (SYSTEM_ATTRS, "trial_system_attribute_id"),
        (STEPS, "trial_intermediate_value_id"),
    )
}
_STUDIES: Table = models.StudyModel.__table__
_STUDY = select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == bindparam("study")).with_for_update()
_ALL_TRIALS = select(TRIALS.c.trial_id).where(TRIALS.c.study_id == bindparam("study"))
_TRIAL = select(TRIALS).where(_THIS)
_NEWER = (
    select(TRIALS)
    .where(TRIALS.c.study_id == bindparam("study"), TRIALS.c.trial_id > bindparam("newest"))
    .order_by(TRIALS.c.trial_id)
)
_OLDER = (
    select(TRIALS)
    .where(TRIALS.c.study_id == bindparam("study"), TRIALS.c.trial_id.in_(bindparam("ids", expanding=True)))
    .order_by(TRIALS.c.trial_id)
)
_EARLIER = select(func.count()).where(TRIALS.c.study_id == bindparam("study"), TRIALS.c.trial_id < bindparam("this"))
_NUMBER = sqlalchemy.update(TRIALS).where(_THIS).values(number=bindparam("counted"))
_AGREED = (
    select(PARAMS.c.distribution_json)
    .join(TRIALS)
    .where(TRIALS.c.study_id == bindparam("study"), PARAMS.c.param_name == bindparam("name"))
    .limit(1)
)
_TAKING = (
    sqlalchemy.update(TRIALS)
    .where(_THIS, TRIALS.c.state == TrialState.WAITING)
    .values(state=TrialState.RUNNING, datetime_start=bindparam("begun_at"))
)
_ENDING = (
    sqlalchemy.update(TRIALS)
    .where(_THIS, TRIALS.c.state == TrialState.RUNNING)
    .values(state=bindparam("ended_as"), datetime_complete=bindparam("ended_at"))
)
_BEAT = (
    sqlalchemy.update(HEARTBEATS)
    .where(HEARTBEATS.c.trial_id == bindparam("this"))
    .values(heartbeat=func.current_timestamp())
)
_STATE = select(TRIALS.c.state).where(_THIS)
_ATTR = select(USER_ATTRS.c.value_json).where(
    USER_ATTRS.c.trial_id == bindparam("this"), USER_ATTRS.c.key == bindparam("name")
)
_FORGET_PARAMS = sqlalchemy.delete(PARAMS).where(PARAMS.c.trial_id == bindparam("this"))
_FORGET = sqlalchemy.delete(USER_ATTRS).where(
    USER_ATTRS.c.trial_id == bindparam("this"), USER_ATTRS.c.key.in_(bindparam("names", expanding=True))
)


def lock_study(connection: Connection, study_id: int) -> bool:
    """Whether there is such a study; where the database has such locks, only this transaction counts its trials now."""
    return connection.execute(_STUDY, {"study": study_id}).scalar() is not None


def insert_trial(
    connection: Connection, study_id: int, template: FrozenTrial, agreed: dict[str, BaseDistribution]
) -> FrozenTrial:
    """Write a new trial that is ``template`` but for its number and id; the trial with both.

    A running one gets its first heartbeat. ``agreed``: distributions by name that are known to fit those of the study's
    earlier trials; extended here. Raises ValueError where one does not fit.
    """
    row = {
        "study_id": study_id,
        "state": template.state,
        "datetime_start": _utc(template.datetime_start),
        "datetime_complete": _utc(template.datetime_complete),
    }
    trial = copy.copy(template)
    inserted: Any = connection.execute(_INSERTS[TRIALS.name], row)
    trial._trial_id = inserted.inserted_primary_key[0]
    this = {"this": trial._trial_id}
    # Counted after it is in: from then on the database lets no one else write, whatever it locked before.
    trial.number = connection.execute(_EARLIER, {"study": study_id, **this}).scalar_one()
    connection.execute(_NUMBER, {"counted": trial.number, **this})
    _check_distributions(connection, study_id, template.distributions, agreed)
    _insert(connection, PARAMS, trial._trial_id, _params(template))
    _insert(connection, VALUES, trial._trial_id, _values(template.values or ()))
    _insert(connection, USER_ATTRS, trial._trial_id, _attrs(template.user_attrs))
    _insert(connection, SYSTEM_ATTRS, trial._trial_id, _attrs(template.system_attrs))
    _insert(connection, STEPS, trial._trial_id, _steps(template.intermediate_values))
    if template.state == TrialState.RUNNING:
        _insert(connection, HEARTBEATS, trial._trial_id, [{}])
    return trial


def _insert(connection: Connection, table: Table, trial_id: int, rows: Iterable[Mapping[str, Any]]) -> None:
    written = [{"trial_id": trial_id, **row} for row in rows]
    if written:
        connection.execute(_INSERTS[table.name], written)


def _params(trial: FrozenTrial) -> list[dict[str, Any]]:
    return [
        {
            "param_name": name,
            "param_value": trial.distributions[name].to_internal_repr(value),
            "distribution_json": distribution_to_json(trial.distributions[name]),
        }
        for name, value in trial.params.items()
    ]


def _values(values: Sequence[float]) -> list[dict[str, Any]]:
    stored = [Value.value_to_stored_repr(value) for value in values]
    return [{"objective": k, "value": value, "value_type": kind} for k, (value, kind) in enumerate(stored)]


def _steps(values: Mapping[int, float]) -> list[dict[str, Any]]:
    stored = {step: Intermediate.intermediate_value_to_stored_repr(value) for step, value in values.items()}
    return [
        {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
        for step, (value, kind) in stored.items()
    ]


def _attrs(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]


def _check_distributions(
    connection: Connection, study_id: int, given: Mapping[str, BaseDistribution], agreed: dict[str, BaseDistribution]
) -> None:
    """ValueError where a distribution does not fit the one that the study has by that name."""
    for name, distribution in given.items():
        if agreed.get(name) == distribution:
            continue
        found = connection.execute(_AGREED, {"study": study_id, "name": name}).scalar()
        if found is not None:
            check_distribution_compatibility(json_to_distribution(found), distribution)
        agreed[name] = distribution


def read_trial(connection: Connection, trial_id: int) -> FrozenTrial | None:
    """The trial of that id, if there is one."""
    trials = _complete(connection, connection.execute(_TRIAL, {"this": trial_id}).all())
    return trials[0] if trials else None


def read_trials(
    connection: Connection,
    study_id: int,
    newest: int,
    others: Iterable[int] = (),
    states: Container[TrialState] | None = None,
) -> list[FrozenTrial]:
    """Trials of a study with an id above ``newest``, and those of the ids ``others``, in the order of their ids."""
    older, found = sorted(i for i in others if i <= newest), list[Any]()
    for first in range(0, len(older), AT_ONCE):
        found += connection.execute(_OLDER, {"study": study_id, "ids": older[first : first + AT_ONCE]}).all()
    found += connection.execute(_NEWER, {"study": study_id, "newest": newest}).all()
    if states is not None:
        found = [row for row in found if row.state in states]
    trials: list[FrozenTrial] = []
    for first in range(0, len(found), AT_ONCE):
        trials += _complete(connection, found[first : first + AT_ONCE])
    return trials


def _complete(connection: Connection, found: Sequence[Any]) -> list[FrozenTrial]:
    """Trials of rows of the table of trials, with what the other tables say of them."""
    if not found:
        return []
    ids = [row.trial_id for row in found]
    children = (_children(connection, table, ids) for table in (PARAMS, VALUES, USER_ATTRS, SYSTEM_ATTRS, STEPS))
    params, values, user, system, steps = children
    trials = []
    for row in found:
        at = row.trial_id
        distributions = {p.param_name: _distribution(p.distribution_json) for p in params[at]}
        trial = FrozenTrial(
            number=row.number,
            state=row.state,
            value=None,
            values=[Value.stored_repr_to_value(v.value, v.value_type) for v in values[at]] or None,
            datetime_start=_local(row.datetime_start),
            datetime_complete=_local(row.datetime_complete),
            params={p.param_name: distributions[p.param_name].to_external_repr(p.param_value) for p in params[at]},
            distributions=distributions,
            user_attrs={a.key: json.loads(a.value_json) for a in user[at]},
            system_attrs={a.key: json.loads(a.value_json) for a in system[at]},
            intermediate_values={
                s.step: Intermediate.stored_repr_to_intermediate_value(s.intermediate_value, s.intermediate_value_type)
                for s in steps[at]
            },
            trial_id=at,
        )
        trials.append(trial)
    return trials


def _children(connection: Connection, table: Table, ids: Sequence[int]) -> dict[int, list[Any]]:
    """Rows of another table, by trial."""
    rows: dict[int, list[Any]] = {trial_id: [] for trial_id in ids}
    for row in connection.execute(_CHILDREN[table.name], {"ids": ids}):
        rows[row.trial_id].append(row)
    return rows


@functools.lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    """One object for all trials: reading it is most of the time that a trial of many parameters takes."""
    return json_to_distribution(text)


def _utc(local: datetime | None) -> datetime | None:
    """Inverse of ``_local``."""
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _local(stored: datetime | None) -> datetime | None:
    """Optuna stores UTC and speaks local time, both without a zone."""
    return None if stored is None else stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def delete_study(connection: Connection, study_id: int) -> bool:
    """Delete a study and all that belongs to it; False where there is none.

    Whoever writes to one of its trials at this moment is waited for, and whoever comes later finds it gone.
    """
    if not lock_study(connection, study_id):
        return False
    of_study = {"study": study_id}
    connection.execute(_ALL_TRIALS.with_for_update(), of_study).all()
    for table in (PARAMS, VALUES, STEPS, USER_ATTRS, SYSTEM_ATTRS, HEARTBEATS):
        connection.execute(sqlalchemy.delete(table).where(table.c.trial_id.in_(_ALL_TRIALS)), of_study)
    for model in (
        models.TrialModel,
        models.StudyDirectionModel,
        models.StudyUserAttributeModel,
        models.StudySystemAttributeModel,
        models.StudyModel,
    ):
        table = model.__table__
        connection.execute(sqlalchemy.delete(table).where(table.c.study_id == bindparam("study")), of_study)
    return True


def take_trial(connection: Connection, trial_id: int, attrs: Mapping[str, Any], begun: FrozenTrial | None) -> bool:
    """Begin a waiting trial, with these user attributes and a first heartbeat; False where it waits no more.

    ``begun``: whose parameters it gets instead of those it has, if any.
    """
    this = {"this": trial_id}
    now = datetime.now(UTC).replace(tzinfo=None)
    if not connection.execute(_TAKING, {"begun_at": now, **this}).rowcount:
        return False
    connection.execute(_FORGET, {"names": list(attrs), **this})
    _insert(connection, USER_ATTRS, trial_id, _attrs(attrs))
    if begun is not None and begun.params:
        connection.execute(_FORGET_PARAMS, this)
        _insert(connection, PARAMS, trial_id, _params(begun))
    # An earlier worker's row is changed, not replaced: its heart may be waiting for that very row.
    if not connection.execute(_BEAT, this).rowcount:
        _insert(connection, HEARTBEATS, trial_id, [{}])
    return True


def finish_trial(
    connection: Connection,
    trial_id: int,
    state: TrialState,
    values: Sequence[float] | None,
    attrs: Mapping[str, Any],
    holder: tuple[str, str | None],
) -> bool:
    """Write how a running trial ended; False where it is not ``holder``'s or ended otherwise, to be rolled back.

    The state comes first: from then on no other worker can write to the trial.
    """
    this = {"this": trial_id}
    now = datetime.now(UTC).replace(tzinfo=None) if state.is_finished() else None
    ended = connection.execute(_ENDING, {"ended_as": state, "ended_at": now, **this})
    whose = connection.execute(_ATTR, {"name": holder[0], **this}).scalar()
    if whose != (None if holder[1] is None else json.dumps(holder[1])):
        return False
    if not ended.rowcount:
        return bool(connection.execute(_STATE, this).scalar() == state)
    connection.execute(_FORGET, {"names": list(attrs), **this})
    _insert(connection, USER_ATTRS, trial_id, _attrs(attrs))
    _insert(connection, VALUES, trial_id, _values(values or ()))
    return True
