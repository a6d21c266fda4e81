"""Optuna's own tests of a storage, on ours; and what ours does more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.storage.attrs import OWNER
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.study_storage import StudyStorage


class TestOnSQLite(StorageTestCase):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> StudyStorage:
        return open_storage(f"sqlite:///{tmp_path}/a.db")


@pytest.mark.slow
class TestOnPostgres(StorageTestCase):
    @pytest.fixture
    def storage(self, server: str) -> Iterator[StudyStorage]:
        database = open_storage(server)
        yield database
        database.remove_session()
        for study in database.get_all_studies():
            database.delete_study(study._study_id)
        database.engine.dispose()


def full_trial(state: TrialState) -> FrozenTrial:
    """A trial with something in every table."""
    return optuna.trial.create_trial(
        state=state,
        values=[float("-inf")] if state == TrialState.COMPLETE else None,
        params={"x": 0.25, "k": 3, "c": "b"},
        distributions={
            "x": optuna.distributions.FloatDistribution(0, 1),
            "k": optuna.distributions.IntDistribution(0, 2**31),
            "c": optuna.distributions.CategoricalDistribution(("a", "b")),
        },
        user_attrs={OWNER: "me", "list": [1, None]},
        system_attrs={"fixed_params": {"x": 0.25}},
        intermediate_values={10: float("nan"), 20: 1.5},
    )


def test_a_trial_is_ended_once_and_by_its_holder(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(storage=database)
    trial_id = database.create_new_trial(study._study_id, full_trial(TrialState.RUNNING))
    for holder in ("another", None):
        assert not database.end_trial(trial_id, TrialState.COMPLETE, [1.0], holder)
        assert database.get_trial(trial_id).state == TrialState.RUNNING
    database.worker = "another"
    with pytest.raises(UpdateFinishedTrialError, match="another worker's"):
        study.tell(0, 1.0)
    database.worker = "me"
    study.tell(0, 1.0)
    finished = database.get_trial(trial_id)
    assert (finished.state, finished.values) == (TrialState.COMPLETE, [1.0])
    assert finished.datetime_complete is not None
    # Again, after the answer was lost: done, and nothing changes. Otherwise: refused.
    assert database.end_trial(trial_id, TrialState.COMPLETE, [2.0], "me")
    assert not database.end_trial(trial_id, TrialState.FAIL, None, "me")
    assert repr(database.get_trial(trial_id)) == repr(finished)


def test_a_trial_of_nobody_is_taken_back_from_nobody_alone(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(storage=database)
    trial_id = database.create_new_trial(study._study_id)
    assert not database.end_trial(trial_id, TrialState.WAITING, None, "me")
    assert database.end_trial(trial_id, TrialState.WAITING, None, None)
    assert study.trials[0].state == TrialState.WAITING


def test_a_trial_that_a_worker_begins_is_its_own_from_the_first_moment(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(storage=database)
    database.worker = "me"
    assert study.ask().user_attrs == {OWNER: "me"}
    database.set_trial_state_values(study.trials[0]._trial_id, TrialState.WAITING)
    database.worker = "another"
    assert study.ask().number == 0
    assert study.trials[0].user_attrs == {OWNER: "another"}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In New York, far from UTC."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.COMPLETE])
def test_times_are_the_same_in_any_zone_and_by_any_reader(tmp_path: Path, state: TrialState) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    study = optuna.create_study(study_name="x", storage=open_storage(url))
    made = full_trial(state)
    study.add_trial(made)
    plain = optuna.load_study(study_name="x", storage=url)
    for found in (study.trials[0], plain.trials[0]):
        assert found.datetime_start == made.datetime_start
        assert found.datetime_complete == made.datetime_complete
    begun = study.ask()
    assert plain.trials[1].datetime_start == begun.datetime_start


def test_a_study_is_deleted_with_all_that_is_its(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/a.db")
    studies = [optuna.create_study(study_name=name, storage=database) for name in ("a", "b")]
    for study in studies:
        study.set_user_attr("k", 1)
        study._storage.set_study_system_attr(study._study_id, "k", 1)
        for state in (TrialState.COMPLETE, TrialState.RUNNING):
            study.add_trial(full_trial(state))
        database.record_heartbeat(study.trials[1]._trial_id)

    def counts() -> dict[str, int]:
        with database.engine.connect() as connection:
            names = [name for name in sqlalchemy.inspect(database.engine).get_table_names() if "version" not in name]
            query = "SELECT COUNT(*) FROM {}"
            return {name: connection.execute(sqlalchemy.text(query.format(name))).scalar_one() for name in names}

    before = counts()
    assert all(before.values())
    database.delete_study(studies[0]._study_id)
    assert counts() == {name: count // 2 for name, count in before.items()}
    with pytest.raises(KeyError):
        database.delete_study(studies[0]._study_id)


def test_on_postgres_a_study_is_deleted_after_whoever_writes_to_it(server: str) -> None:
    database, rival = open_storage(server), open_storage(server)
    study = optuna.create_study(study_name="deleted", storage=database)
    trial = rival.create_new_trial(study._study_id, full_trial(TrialState.RUNNING))
    held = sqlalchemy.text("UPDATE trial_user_attributes SET value_json = value_json WHERE trial_id = :trial")
    with rival.engine.begin() as connection, ThreadPoolExecutor(1) as threads:
        connection.execute(held, {"trial": trial})
        deleted = threads.submit(database.delete_study, study._study_id)
        time.sleep(0.3)
        assert not deleted.done()
        connection.commit()
        deleted.result(30)
    assert "deleted" not in [s.study_name for s in database.get_all_studies()]
    with pytest.raises(KeyError):
        rival.create_new_trial(study._study_id, full_trial(TrialState.RUNNING))


def test_on_postgres_a_trial_is_ended_by_one_of_two(server: str) -> None:
    """Its worker was taken for dead and thaws at the moment in which another one takes the trial back."""
    database, rival = open_storage(server), open_storage(server)
    study = optuna.create_study(study_name="taken", storage=database)
    trial = rival.create_new_trial(study._study_id, full_trial(TrialState.RUNNING))
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(database.end_trial, trial, TrialState.WAITING, None, "me"),
            threads.submit(rival.end_trial, trial, TrialState.COMPLETE, [1.0], "me"),
        ]
        done = [end.result(30) for end in ends]
    assert sorted(done) == [False, True]
    assert database.get_trial(trial).state == (TrialState.WAITING if done[0] else TrialState.COMPLETE)
    database.delete_study(study._study_id)
