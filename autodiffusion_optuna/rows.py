"""Whole trials as rows of Optuna's tables, read and written with few statements.

Optuna's own code goes through one object per row, and asks twice per parameter when a trial begins: a tenth of a second
for a trial of 30 parameters. The rows are the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
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
from sqlalchemy.orm import Session

AT_ONCE = 500
"""Trials asked for in one statement: databases limit the number of its parameters."""
Value = models.TrialValueModel
Intermediate = models.TrialIntermediateValueModel


def insert_trial(session: Session, study_id: int, template: FrozenTrial, agreed: dict[str, BaseDistribution]) -> Any:
    """Write a new trial that is ``template`` but for its number; its row. A running one gets its first heartbeat.

    ``agreed``: distributions by name that are known to fit those of the study's earlier trials; extended here.
    Raises ValueError where one does not fit.
    """
    trial: Any = models.TrialModel(
        study_id=study_id,
        state=template.state,
        datetime_start=template.datetime_start,
        datetime_complete=template.datetime_complete,
    )
    session.add(trial)
    session.flush()
    trial.number = trial.count_past_trials(session)
    _check_distributions(session, study_id, template.distributions, agreed)
    _insert(session, models.TrialParamModel, trial.trial_id, _params(template))
    _insert(session, Value, trial.trial_id, _values(template.values or ()))
    _insert(session, models.TrialUserAttributeModel, trial.trial_id, _attrs(template.user_attrs))
    _insert(session, models.TrialSystemAttributeModel, trial.trial_id, _attrs(template.system_attrs))
    _insert(session, Intermediate, trial.trial_id, _steps(template.intermediate_values))
    if template.state == TrialState.RUNNING:
        _insert(session, models.TrialHeartbeatModel, trial.trial_id, [{}])
    return trial


def _insert(session: Session, model: Any, trial_id: int, rows: Iterable[Mapping[str, Any]]) -> None:
    written = [{"trial_id": trial_id, **row} for row in rows]
    if written:
        session.execute(sqlalchemy.insert(model.__table__), written)


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
    session: Session, study_id: int, given: Mapping[str, BaseDistribution], agreed: dict[str, BaseDistribution]
) -> None:
    """ValueError where a distribution does not fit the one that the study has by that name."""
    params = models.TrialParamModel.__table__
    for name, distribution in given.items():
        if agreed.get(name) == distribution:
            continue
        earlier = (
            sqlalchemy.select(params.c.distribution_json)
            .join(models.TrialModel.__table__)
            .where(models.TrialModel.study_id == study_id, params.c.param_name == name)
            .limit(1)
        )
        found = session.execute(earlier).scalar()
        if found is not None:
            check_distribution_compatibility(json_to_distribution(found), distribution)
        agreed[name] = distribution


def read_trials(session: Session, where: Sequence[Any]) -> list[FrozenTrial]:
    """Trials that fulfil the conditions, in the order of their ids."""
    table = models.TrialModel.__table__
    found = session.execute(sqlalchemy.select(table).where(*where).order_by(table.c.trial_id)).all()
    trials: list[FrozenTrial] = []
    for first in range(0, len(found), AT_ONCE):
        trials += _complete(session, found[first : first + AT_ONCE])
    return trials


def _complete(session: Session, found: Sequence[Any]) -> list[FrozenTrial]:
    """Trials of rows of the table of trials, with what the other tables say of them."""
    ids = [row.trial_id for row in found]
    params = _children(session, models.TrialParamModel, ids, "param_id")
    values = _children(session, Value, ids, "objective")
    user = _children(session, models.TrialUserAttributeModel, ids, "trial_user_attribute_id")
    system = _children(session, models.TrialSystemAttributeModel, ids, "trial_system_attribute_id")
    steps = _children(session, Intermediate, ids, "trial_intermediate_value_id")
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


def _children(session: Session, model: Any, ids: Sequence[int], order: str) -> dict[int, list[Any]]:
    """Rows of another table, by trial."""
    table = model.__table__
    rows: dict[int, list[Any]] = {trial_id: [] for trial_id in ids}
    for row in session.execute(sqlalchemy.select(table).where(table.c.trial_id.in_(ids)).order_by(table.c[order])):
        rows[row.trial_id].append(row)
    return rows


@functools.lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    """One object for all trials: reading it is most of the time that a trial of many parameters takes."""
    return json_to_distribution(text)


def _local(stored: datetime | None) -> datetime | None:
    """Optuna stores UTC and speaks local time, both without a zone."""
    return None if stored is None else stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


def finish_trial(
    session: Session,
    trial_id: int,
    state: TrialState,
    values: Sequence[float] | None,
    attrs: Mapping[str, Any],
    holder: tuple[str, str],
) -> bool:
    """Write how a running trial ended; False where it is not ``holder``'s or ended otherwise, to be rolled back.

    The state comes first: from then on no other worker can write to the trial.
    """
    trials, user = models.TrialModel.__table__, models.TrialUserAttributeModel.__table__
    this = trials.c.trial_id == trial_id
    ending = sqlalchemy.update(trials).where(this, trials.c.state == TrialState.RUNNING)
    now = datetime.now(UTC).replace(tzinfo=None)
    ended: Any = session.execute(ending.values(state=state, datetime_complete=now))
    whose = sqlalchemy.select(user.c.value_json).where(user.c.trial_id == trial_id, user.c.key == holder[0])
    if session.execute(whose).scalar() != json.dumps(holder[1]):
        return False
    if not ended.rowcount:
        return bool(session.execute(sqlalchemy.select(trials.c.state).where(this)).scalar() == state)
    session.execute(sqlalchemy.delete(user).where(user.c.trial_id == trial_id, user.c.key.in_(list(attrs))))
    _insert(session, models.TrialUserAttributeModel, trial_id, _attrs(attrs))
    _insert(session, Value, trial_id, _values(values or ()))
    return True
