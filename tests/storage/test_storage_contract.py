"""Optuna's own tests of a storage, on ours; and what ours does more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.storage import rows as statements
from autodiffusion_optuna.storage.database import StudyStorage, open_storage
from autodiffusion_optuna.storage.lease import OWNER

HOLDER = (OWNER, "me")


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


def rows(database: RDBStorage) -> dict[str, list[tuple[object, ...]]]:
    """All rows of the tables of trials, without their own ids."""
    found = {}
    with database.engine.connect() as connection:
        for name in ("trials", "trial_params", "trial_values", "trial_user_attributes", "trial_intermediate_values"):
            rows = connection.execute(sqlalchemy.text(f"SELECT * FROM {name}")).all()
            found[name] = sorted((tuple(row[1:]) for row in rows), key=repr)
    return found


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING])
def test_the_rows_are_those_that_optuna_writes(tmp_path: Path, state: TrialState) -> None:
    written = []
    template = full_trial(state)
    for kind, name in ((StudyStorage, "ours"), (RDBStorage, "theirs")):
        database = kind(f"sqlite:///{tmp_path}/{name}.db")
        optuna.create_study(storage=database, study_name="s").add_trial(template)
        written.append(rows(database))
    assert written[0] == written[1]
    assert len(written[0]["trial_params"]) == 3


def read(trial: FrozenTrial) -> str:
    """A trial as text: NaN equals nothing, itself included. Optuna reads attributes in no order."""
    trial.user_attrs = dict(sorted(trial.user_attrs.items()))
    trial.system_attrs = dict(sorted(trial.system_attrs.items()))
    return repr(trial)


def test_a_trial_reads_as_optuna_reads_it(tmp_path: Path) -> None:
    ours = open_storage(f"sqlite:///{tmp_path}/a.db")
    study_id = ours.create_new_study([optuna.study.StudyDirection.MINIMIZE], "s")
    trial_id = ours.create_new_trial(study_id, full_trial(TrialState.COMPLETE))
    theirs = RDBStorage(f"sqlite:///{tmp_path}/a.db")
    assert read(ours.get_trial(trial_id)) == read(theirs.get_trial(trial_id))
    assert [read(t) for t in ours.get_all_trials(study_id)] == [read(t) for t in theirs.get_all_trials(study_id)]


def test_a_distribution_that_does_not_fit_is_refused_and_nothing_written(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(storage=database)
    study.add_trial(full_trial(TrialState.COMPLETE))
    other = {"x": optuna.distributions.IntDistribution(0, 1)}
    with pytest.raises(ValueError, match="distribution"):
        study.add_trial(optuna.trial.create_trial(params={"x": 1}, distributions=other, value=0.0))
    assert len(open_storage(f"sqlite:///{tmp_path}/a.db").get_all_trials(study._study_id)) == 1


def test_a_trial_is_finished_once_and_by_its_holder(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/a.db")
    study = optuna.create_study(storage=database)
    trial_id = database.create_new_trial(study._study_id, full_trial(TrialState.RUNNING))
    assert trial_id in database.beats(study._study_id)
    assert not database.finish_trial(trial_id, TrialState.COMPLETE, [1.0], {"a": 1}, (OWNER, "another"))
    assert database.get_trial(trial_id).state == TrialState.RUNNING
    assert "a" not in database.get_trial(trial_id).user_attrs
    assert database.finish_trial(trial_id, TrialState.COMPLETE, [1.0], {"a": 1, "list": []}, HOLDER)
    finished = database.get_trial(trial_id)
    assert (finished.state, finished.values) == (TrialState.COMPLETE, [1.0])
    assert finished.user_attrs == {OWNER: "me", "list": [], "a": 1}
    assert finished.datetime_complete is not None
    # Told again, after the answer was lost: done, and nothing changes. Told otherwise: refused.
    assert database.finish_trial(trial_id, TrialState.COMPLETE, [2.0], {"a": 2}, HOLDER)
    assert not database.finish_trial(trial_id, TrialState.FAIL, None, {}, HOLDER)
    assert repr(database.get_trial(trial_id)) == repr(finished)


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
    begun = open_storage(url).begin_trial(study._study_id, full_trial(TrialState.RUNNING))
    assert plain.trials[1].datetime_start == begun.datetime_start


def test_a_study_is_deleted_with_all_that_is_its(tmp_path: Path) -> None:
    database = open_storage(f"sqlite:///{tmp_path}/a.db")
    studies = [optuna.create_study(study_name=name, storage=database) for name in ("a", "b")]
    for study in studies:
        study.set_user_attr("k", 1)
        study._storage.set_study_system_attr(study._study_id, "k", 1)
        for state in (TrialState.COMPLETE, TrialState.RUNNING):
            study.add_trial(full_trial(state))

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
    trial = rival.begin_trial(study._study_id, full_trial(TrialState.RUNNING))
    with rival.engine.begin() as connection, ThreadPoolExecutor(1) as threads:
        assert statements.finish_trial(connection, trial._trial_id, TrialState.COMPLETE, [1.0], {"late": 1}, HOLDER)
        deleted = threads.submit(database.delete_study, study._study_id)
        time.sleep(0.3)
        assert not deleted.done()
        connection.commit()
        deleted.result(30)
    assert "deleted" not in [s.study_name for s in database.get_all_studies()]
    with pytest.raises(KeyError):
        rival.begin_trial(study._study_id, full_trial(TrialState.RUNNING))


def test_on_postgres_a_heart_beats_on_while_its_trial_is_taken(server: str) -> None:
    """Its worker was taken for dead and thaws at the moment in which another one takes the trial."""
    database, rival = open_storage(server), open_storage(server)
    study = optuna.create_study(study_name="taken", storage=database)
    trial = rival.begin_trial(study._study_id, full_trial(TrialState.RUNNING))._trial_id
    assert rival.finish_trial(trial, TrialState.WAITING, None, {}, HOLDER)
    with rival.engine.connect() as connection, ThreadPoolExecutor(1) as threads:
        assert statements.take_trial(connection, trial, {OWNER: "another"}, None)
        beat = threads.submit(database.record_heartbeat, trial)
        time.sleep(0.3)
        assert not beat.done()
        connection.commit()
        beat.result(30)
    assert database.beats(study._study_id).keys() == {trial}
    database.delete_study(study._study_id)
