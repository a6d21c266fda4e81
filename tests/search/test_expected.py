"""What the surrogate learns from trials that a pruner stopped."""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search import surrogate
from autodiffusion_optuna.search.history import History, HistoryReader, expected
from autodiffusion_optuna.search.space import SearchSpace

SPACE = SearchSpace(T=1000, min_steps=2, max_steps=2)


def trial(first: int, rungs: dict[int, float], value: float | None) -> FrozenTrial:
    return create_trial(
        state=TrialState.PRUNED if value is None else TrialState.COMPLETE,
        value=value,
        params=dict(SPACE.encode(Candidate((first, 0)))),
        distributions=SPACE.distributions(),
        intermediate_values=rungs,
    )


def history_of(*trials: FrozenTrial, direction: str = "minimize") -> History:
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    return HistoryReader().history(SPACE, study, study.get_trials(), len(trials))


COMPLETE = [trial(100 + i, {32: 5 * value, 128: value}, value) for i, value in enumerate((9.0, 20.0, 80.0))]


def test_a_stopped_trial_stands_where_its_last_rung_says() -> None:
    found = expected(history_of(*COMPLETE, trial(500, {32: 250.0}, None), trial(600, {32: 250.0, 128: 15.0}, None)))
    assert [record.number for record in found] == [0, 4, 1, 3, 2]
    assert [record.stopped for record in found] == [False, True, False, True, False]
    assert found[3].losses[0] == pytest.approx(50, rel=0.1)


def test_without_complete_trials_to_learn_from_they_say_nothing() -> None:
    stopped = trial(500, {32: 250.0}, None)
    assert [record.number for record in expected(history_of(*COMPLETE[:2], stopped))] == [0, 1]
    assert [record.number for record in expected(history_of(stopped))] == []
    other = trial(500, {64: 250.0}, None)  # of a rung that no complete one has
    assert [record.number for record in expected(history_of(*COMPLETE, other))] == [0, 1, 2]


def test_they_are_taken_but_no_parents_and_one_without_values_says_nothing() -> None:
    stopped, silent = trial(500, {32: 250.0}, None), trial(600, {}, None)
    history = history_of(*COMPLETE, stopped, silent)
    assert {Candidate((500, 0)).key, Candidate((600, 0)).key} <= history.taken
    assert [record.number for record in history.ranked] == [0, 1, 2]
    assert [record.number for record in history.stopped] == [3]


def test_with_a_barrier_only_those_of_earlier_generations_count() -> None:
    failed = create_trial(state=TrialState.FAIL)
    history = history_of(*COMPLETE, failed, trial(500, {32: 250.0}, None), trial(600, {32: 90.0}, None))
    assert [record.number for record in history.before(4).stopped] == [4]  # its index is 3: the failed one is none
    assert [record.number for record in expected(history.before(4))] == [0, 1, 4, 2]


def test_larger_values_are_better_where_the_study_maximises() -> None:
    complete = [trial(100 + i, {32: value}, value) for i, value in enumerate((9.0, 20.0, 80.0, 50.0))]
    found = expected(history_of(*complete, trial(500, {32: 60.0}, None), direction="maximize"))
    assert [record.number for record in found] == [2, 4, 3, 1, 0]


def test_what_was_no_number_is_worst() -> None:
    found = expected(history_of(*COMPLETE, trial(500, {32: math.inf}, None)))
    assert found[-1].number == 3
    assert found[-1].losses == (math.inf,)


def test_the_choice_among_children_follows_the_stopped() -> None:
    """Complete trials are alike everywhere; only stopped ones show where it is bad."""
    complete = [trial(t, {32: 10 + i}, 10.0 + i) for i, t in enumerate(range(50, 1000, 100))]
    stopped = [trial(t, {32: 500.0}, None) for t in range(505, 1000, 20)]
    children = [Candidate((t, 0)) for t in (950, 740, 260)]
    chosen = surrogate.choose(children, expected(history_of(*complete, *stopped)), SPACE)
    assert chosen == children[2]
