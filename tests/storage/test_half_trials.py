"""Trials that were cut off at some write, or are others', lock nothing: all views bear them and the search goes on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Adopt
from optuna.trial import TrialState, create_trial

from autodiffusion_optuna.report.dashboard import publish
from autodiffusion_optuna.storage import lease as claims
from autodiffusion_optuna.storage.attrs import (
    BASELINE_COSTS,
    CANDIDATE,
    COST,
    GENERATION,
    OPERATOR,
    READY,
    REFERENCE_IMAGES,
    RUNTIME,
    SANITY,
    SCORE,
    STAGE,
    WARNINGS,
)
from autodiffusion_optuna.storage.trials import FINISHED
from studies import run

GENES = {f"t_{k:02d}": optuna.distributions.IntDistribution(0, 999) for k in range(3)}
WHOLE = {"t_00": 900, "t_01": 500, "t_02": 100}


def waiting(**attrs: Any) -> Callable[[optuna.Study], None]:
    trial = create_trial(state=TrialState.WAITING, params=WHOLE, distributions=GENES, user_attrs=attrs)
    return lambda study: study.add_trial(trial)


def enqueued(params: dict[str, Any], **attrs: Any) -> Callable[[optuna.Study], None]:
    return lambda study: study.enqueue_trial(params, user_attrs=attrs)


def begun(genes: int = 0, **attrs: Any) -> Callable[[optuna.Study], None]:
    """As an older version, or another program, leaves it where it is killed."""

    def begin(study: optuna.Study) -> None:
        trial = study.ask()
        for name in list(GENES)[:genes]:
            trial.suggest_int(name, 0, 999)
        for name, value in {claims.OWNER: f"{claims.host()}/999999999/1", **attrs}.items():
            trial.set_user_attr(name, value)

    return begin


def told(state: TrialState, value: float | None, **attrs: Any) -> Callable[[optuna.Study], None]:
    trial = create_trial(state=state, value=value, user_attrs=attrs)
    return lambda study: study.add_trial(trial)


HALVES = {  # those that ask come first: they would be given what is enqueued
    "begun, nothing": begun(),
    "begun, a part": begun(2),
    "begun, all": begun(3),
    "begun, with a generation": begun(3, generation=1),
    "begun, without a cost": begun(3, generation=1, stage=1, operator="baseline", share=0.0, candidate="900,500,100"),
    "begun by a person": begun(3, worker="me"),
    "enqueued, all": enqueued(WHOLE),
    "enqueued, nothing": enqueued({}),
    "enqueued, a part": enqueued({"t_01": 500}),
    "enqueued, out of range": enqueued({**WHOLE, "t_00": 10**6}),
    "enqueued, endless": enqueued({**WHOLE, "t_00": float("inf")}),
    "enqueued, a word": enqueued({**WHOLE, "t_00": "first"}),
    "enqueued, other names": enqueued({"learning_rate": 0.1}),
    "enqueued, with an attribute": enqueued(WHOLE, generation=7),
    "enqueued, with another's attributes": enqueued(WHOLE, candidate="3,2,1", cost=1.0, stage=1, generation=0),
    "added, waiting": waiting(),
    "added, with a generation": waiting(generation=1),
    "complete, without anything": told(TrialState.COMPLETE, -5.0),
    "complete, without a cost": told(TrialState.COMPLETE, -5.0, candidate="900,500,100"),
    "complete, known": told(TrialState.COMPLETE, -5.0, candidate="900,500,100", baseline="uniform"),
    "complete, a half": told(TrialState.COMPLETE, -5.0, candidate="900,500,100", generation=1),
    "complete, of nonsense": told(TrialState.COMPLETE, -5.0, candidate="nonsense", cost=1.0),
    "complete, of a number": told(TrialState.COMPLETE, -5.0, candidate=5, cost=1.0),
    "complete, at no cost": told(TrialState.COMPLETE, -5.0, candidate="900,500,100", cost=None),
    "complete, of an unknown name": told(TrialState.COMPLETE, -5.0, candidate="900,500,100", baseline="x"),
    "complete, of no generation": told(
        TrialState.COMPLETE, -5.0, candidate="900,500,100", cost=1.0, generation=None, score=5
    ),
    "complete, endless": told(TrialState.COMPLETE, float("inf")),
    "pruned": told(TrialState.PRUNED, None),
    "failed": told(TrialState.FAIL, None, generation=2),
}


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in HALVES), "all at once"])
def test_every_view_bears_it_and_the_search_goes_on(quick: optuna.Study, folder: Path, adopt: Adopt, kind: str) -> None:
    for half in HALVES.values() if kind == "all at once" else [HALVES[kind]]:
        half(quick)
    look(quick, adopt)
    result = adopt("run", "--study", "quick", "--set", "search.trials=40", "--set", "search.grace=1")
    assert result.code == 0, result
    look(quick, adopt)
    trials = quick.get_trials(deepcopy=False)
    assert sum(t.state in FINISHED for t in trials) == 40
    ours = [t for t in trials if t.state == TrialState.COMPLETE and claims.OWNER in t.user_attrs]
    named = {CANDIDATE, COST, GENERATION, STAGE, OPERATOR, SCORE}
    assert all(named <= t.user_attrs.keys() for t in ours)
    assert all(len(t.params) == 3 for t in ours)


def look(study: optuna.Study, adopt: Adopt) -> None:
    """All that reads a study without its model."""
    for command in (
        ("show", "--study", "quick"),
        ("show", "--study", "quick", "--json"),
        ("status", "--study", "quick"),
        ("status", "--study", "quick", "--json"),
        ("studies", "list"),
        ("report", "--study", "quick", "--out", "quick.html"),
        ("export", "--study", "quick", "--format", "json"),
    ):
        result = adopt(*command)
        assert result.code == 0, (command, result)
    publish(study, "sqlite:///adopt.db")


LOST = (RUNTIME, WARNINGS, SANITY, REFERENCE_IMAGES)


@pytest.mark.parametrize(
    ("lost", "left"), [(BASELINE_COSTS, "none"), *((key, left) for key in LOST for left in ("none", "null"))]
)
def test_what_a_study_does_not_say_locks_nothing(
    quick: optuna.Study, folder: Path, adopt: Adopt, lost: str, left: str
) -> None:
    change = "UPDATE {} SET value_json = 'null'" if left == "null" else "DELETE FROM {}"
    with sqlite3.connect(folder / "adopt.db") as connection:
        connection.execute(change.format("study_user_attributes") + " WHERE key = ?", (lost,))
    connection.close()
    look(quick, adopt)
    result = adopt("run", "--study", "quick", "--set", "search.trials=25")
    assert result.code == 0, result
    assert "computed otherwise" not in result.err


def test_a_beginning_that_was_cut_off_goes_on_under_its_name_and_as_it_was(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = optuna.Study.set_user_attr

    def cut_off(study: optuna.Study, key: str, value: Any) -> None:
        if key == READY:
            raise KeyboardInterrupt
        write(study, key, value)

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "set_user_attr", cut_off)
        assert adopt("run", "--study", "quick.toml", "--set", "search.trials=9").code == 130
    other = adopt("run", "--study", "quick.toml", "--set", "sampling.steps=4")
    assert other.code == 1
    assert "sampling.steps: 3 -> 4" in other.err  # what waits in its queue has three
    assert adopt("run", "--study", "quick").code == 0
    found = optuna.load_study(study_name="quick", storage="sqlite:///adopt.db")
    assert sum(t.state == TrialState.COMPLETE for t in found.trials) == 9


def test_what_an_enqueued_trial_leaves_open_is_proposed(folder: Path) -> None:
    start = "search.warm_starts=['uniform']"
    opened = run(folder / "quick.toml", "sqlite:///adopt.db", start, "search.trials=7")
    number = len(opened.trials)
    opened.enqueue_trial({"t_01": 500})
    opened.enqueue_trial({"t_00": "first"})
    run(folder / "quick.toml", "sqlite:///adopt.db", start, "search.trials=8")
    part = opened.trials[number]
    assert 500 in part.params.values()
    assert part.user_attrs[OPERATOR] == "baseline"
    run(folder / "quick.toml", "sqlite:///adopt.db", start, "search.trials=9")
    word = opened.trials[number + 1]
    assert word.state == TrialState.FAIL
    assert "no candidate" in word.user_attrs[claims.FAILURE]
