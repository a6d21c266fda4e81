"""Moments in which two workers meet, or one is cut off: each is forced, in one process with two names."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import OperationalError

from autodiffusion_optuna.storage import lease
from autodiffusion_optuna.storage.attrs import CANDIDATE, FAILURE, OWNER, RETRIES
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.study_storage import StudyStorage, id_of_trial
from autodiffusion_optuna.study import components, lifecycle, loop
from studies import config_with

URL = "sqlite:///adopt.db"
FIXED = {"t_00": 900, "t_01": 500, "t_02": 100}


class Two:
    """One study as workers A and B see it. ``built``: its components, which both use."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built = components.build(config_with(folder / "quick.toml", "search.warm_starts=['uniform']"))
        self.name = "A"
        process = lease.owner()
        monkeypatch.setattr(lease, "owner", lambda: f"{process}-{self.name}")
        monkeypatch.setattr(lease, "is_dead", lambda name: False)
        self.storages: dict[str, StudyStorage] = {name: open_storage(URL) for name in "AB"}
        self.studies: dict[str, optuna.Study] = {
            name: lifecycle.open_study(self.built, storage) for name, storage in self.storages.items()
        }

    @contextmanager
    def as_b(self) -> Iterator[None]:
        self.name = "B"
        yield
        self.name = "A"

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.studies["B"].get_trials(deepcopy=False)

    def acquire(self, budget: int = 9, publish: Callable[[optuna.Trial], None] | None = None) -> lease.Lease | str:
        study, storage = self.studies[self.name], self.storages[self.name]
        propose = publish or (lambda trial: loop.propose(self.built, study, trial))
        return lease.acquire(study, storage, budget, propose, grace=600)

    def lease(self, **given: Any) -> lease.Lease:
        found = self.acquire(**given)
        assert isinstance(found, lease.Lease)
        return found

    def end(self, held: lease.Lease, value: float) -> str:
        """Score a trial with that value; its candidate."""
        study = self.studies[self.name]
        candidate = loop.describe(self.built, study, held.trial)
        assert not isinstance(candidate, str)
        study.tell(held.trial, value)
        return candidate.key

    def take_over(self, number: int) -> lease.Lease:
        """B takes a trial back from A, which seems dead, and runs it."""
        assert lease.take_back(self.storages["B"], self.trials[number], "was silent")
        held = self.lease()
        assert held.number == number
        return held


@pytest.fixture
def two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    return Two(folder, monkeypatch)


@pytest.mark.parametrize("finished", [False, True])
def test_a_worker_that_thaws_before_its_candidate_is_published_changes_nothing(two: Two, finished: bool) -> None:
    held: list[lease.Lease] = []

    def frozen(trial: optuna.Trial) -> None:
        with two.as_b():
            held.append(two.take_over(trial.number))
            if finished:
                held_key.append(two.end(held[0], 5.0))
        trial.set_user_attr(CANDIDATE, "3,2,1")

    held_key: list[str] = []
    with pytest.raises(UpdateFinishedTrialError):
        two.acquire(publish=frozen)
    with two.as_b():
        key = held_key[0] if finished else two.end(held[0], 5.0)
    trial = two.trials[0]
    assert (trial.state, trial.values, trial.user_attrs[CANDIDATE]) == (TrialState.COMPLETE, [5.0], key)


def test_a_worker_that_thaws_writes_nothing_to_what_another_runs(two: Two) -> None:
    held = two.lease()
    with two.as_b():
        other = two.take_over(held.number)
    for write in (
        lambda: held.trial.set_user_attr("a", 1),
        lambda: held.trial.suggest_int("t_00", 0, 999),
        lambda: held.trial.report(1.0, 8),
        lambda: held.set_system_attr("a", 1),
        lambda: loop.finish(two.studies["A"], held, loop.Outcome(TrialState.FAIL, reason="a fault")),
    ):
        with pytest.raises(UpdateFinishedTrialError):
            write()
    with two.as_b():
        two.end(other, 5.0)
    assert FAILURE not in two.trials[0].user_attrs
    assert "a" not in two.trials[0].user_attrs | two.trials[0].system_attrs


def test_without_the_lock_a_waiting_trial_that_another_took_makes_no_new_one(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def unlocked(storage: StudyStorage, study: optuna.Study) -> Iterator[None]:
        yield

    monkeypatch.setattr(StudyStorage, "locked", unlocked)
    study, ask = two.studies["A"], two.studies["A"].ask

    def overtaken() -> optuna.Trial:
        with two.as_b():
            assert two.lease(budget=1).number == 0
        return ask()

    monkeypatch.setattr(study, "ask", overtaken)
    assert two.acquire(budget=1) == "wait"
    assert [t.state for t in two.trials] == [TrialState.RUNNING, TrialState.FAIL]


def test_a_trial_that_was_just_taken_over_is_not_taken_away_again(two: Two) -> None:
    """Between the lock's end and the first beat another worker sees the dead one's last beat."""
    held = two.lease()
    database = two.storages["A"]
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
    study_id = database.get_study_id_from_name("quick")
    assert database.beats(study_id)[held.id].silence > 1e6
    lease.release(database, held.id)
    with two.as_b():
        two.storages["B"].worker = lease.owner()
        assert two.studies["B"].ask().number == held.number
    assert database.beats(study_id)[held.id].silence < 60


def test_a_trial_that_ends_as_it_is_taken_back_for_the_last_time_is_left_alone(two: Two) -> None:
    held = two.lease()
    held.trial.set_user_attr(RETRIES, lease.MAX_RETRIES)
    seen = two.trials[0]
    two.end(held, 3.0)
    with two.as_b():
        assert not lease.take_back(two.storages["B"], seen, "died")
    assert two.trials[0].state == TrialState.COMPLETE
    assert FAILURE not in two.trials[0].user_attrs


def test_a_taken_trial_whose_answer_was_lost_is_taken_once(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    study, database = two.studies["A"], two.storages["A"]
    study.enqueue_trial(FIXED)
    call, calls = database.in_one_transaction, list[bool]()

    def cut_off(*given: Any) -> bool:
        calls.append(call(*given))
        if len(calls) == 1:
            error = OperationalError("s", {}, sqlite3.OperationalError("server closed the connection"))
            raise StorageInternalError("gone") from error
        return calls[-1]

    monkeypatch.setattr(database, "in_one_transaction", cut_off)
    assert two.lease().number == 0
    assert [t.state for t in two.trials] == [TrialState.RUNNING, TrialState.WAITING]


def test_a_reason_to_fail_of_an_earlier_try_is_not_kept(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    held, database = two.lease(), two.storages["A"]
    with monkeypatch.context() as killed:
        killed.setattr(database, "end_trial", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.finish(two.studies["A"], held, loop.Outcome(TrialState.FAIL, reason="out of memory"))
    assert two.trials[0].user_attrs[FAILURE] == "out of memory"
    lease.release(database, held.id)
    with two.as_b():
        two.end(two.lease(), 3.0)
    assert FAILURE not in two.trials[0].user_attrs


@pytest.mark.parametrize("fixed", [{"t_00": 100}, {"t_02": 900}, {"t_01": 990}])
def test_what_was_enqueued_in_part_is_the_same_candidate_after_a_stop(two: Two, fixed: dict[str, int]) -> None:
    two.end(two.lease(), 1.0)
    two.studies["A"].enqueue_trial(fixed)
    held = two.lease()
    expected = two.built.space.decode({**held.trial.relative_params, **fixed})
    lease.release(two.storages["A"], held.id)
    with two.as_b():
        assert two.end(two.lease(), 2.0) == expected.key


def test_a_stop_in_the_middle_of_a_transaction_leaves_no_lock(two: Two) -> None:
    held, database = two.lease(), two.storages["A"]

    def stopped() -> None:
        raise KeyboardInterrupt

    ends = database.rdb.set_trial_state_values
    database.rdb.set_trial_state_values = lambda *given: stopped()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        database.end_trial(held.id, TrialState.WAITING, None, lease.owner())
    database.rdb.set_trial_state_values = ends  # type: ignore[method-assign]
    connection = sqlite3.connect("adopt.db", timeout=0.1)
    connection.execute("UPDATE trials SET state = state")
    connection.close()


def test_all_that_a_worker_left_is_given_up_when_the_budget_is_met(two: Two) -> None:
    two.storages["A"].worker = lease.owner()
    left = [two.studies["A"].ask() for _ in range(2)]
    assert all(trial.user_attrs[OWNER] == lease.owner() for trial in left)
    two.studies["B"].add_trial(create_trial(value=1.0))
    assert two.acquire(budget=1) == "done"
    assert [t.state for t in two.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    assert id_of_trial(two.trials[0]) == id_of_trial(left[0])


def test_a_fault_is_raised_also_where_another_worker_has_taken_the_trial(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(*given: Any, **options: Any) -> Any:
        calls.append(1)
        with two.as_b():
            two.take_over(0)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(type(two.built.evaluator), "score", broken)
    with pytest.raises(RuntimeError, match="kernel"):
        loop.work(two.built, two.studies["A"], two.storages["A"])
    assert len(calls) == 1
    assert two.trials[0].state == TrialState.RUNNING
    assert FAILURE not in two.trials[0].user_attrs


def test_a_worker_begins_no_trial_of_a_study_that_was_deleted(two: Two) -> None:
    database = two.storages["A"]
    database.worker = lease.owner()
    two.storages["B"].delete_study(database.get_study_id_from_name("quick"))
    with pytest.raises(KeyError):
        two.studies["A"].ask()
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM trials").scalar() == 0
