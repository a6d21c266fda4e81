"""Trials that were cut off at some write, or are others', lock nothing: all views bear them and the search goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Adopt
from optuna.trial import TrialState, create_trial
from test_study import run

from autodiffusion_optuna import claims, records
from autodiffusion_optuna.dashboard import publish

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
    "begun, without a cost": begun(3, generation=1, stage=1, operator="known", share=0.0, candidate="900,500,100"),
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
    "complete, known": told(TrialState.COMPLETE, -5.0, candidate="900,500,100", known="uniform"),
    "complete, a half": told(TrialState.COMPLETE, -5.0, candidate="900,500,100", generation=1),
    "complete, endless": told(TrialState.COMPLETE, float("inf")),
    "pruned": told(TrialState.PRUNED, None),
    "failed": told(TrialState.FAIL, None, generation=2),
}


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in HALVES), "all at once"])
def test_every_view_bears_it_and_the_search_goes_on(quick: optuna.Study, folder: Path, adopt: Adopt, kind: str) -> None:
    for half in HALVES.values() if kind == "all at once" else [HALVES[kind]]:
        half(quick)
    look(quick, adopt)
    result = adopt("run", "--study", "quick", "--set", "search.trials=33", "--set", "search.grace=1")
    assert result.code == 0, result
    look(quick, adopt)
    trials = quick.get_trials(deepcopy=False)
    assert sum(t.state in records.FINISHED for t in trials) == 33
    ours = [t for t in trials if t.state == TrialState.COMPLETE and claims.OWNER in t.user_attrs]
    named = {records.CANDIDATE, records.COST, records.GENERATION, records.STAGE, records.OPERATOR, records.SCORE}
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


def test_what_an_enqueued_trial_leaves_open_is_proposed(folder: Path) -> None:
    start = "search.warm_starts=['uniform']"
    opened = run(folder / "quick.toml", "sqlite:///adopt.db", start, "search.trials=7")
    number = len(opened.trials)
    opened.enqueue_trial({"t_01": 500})
    opened.enqueue_trial({"t_00": "first"})
    run(folder / "quick.toml", "sqlite:///adopt.db", start, "search.trials=8")
    part = opened.trials[number]
    assert 500 in part.params.values()
    assert part.user_attrs[records.OPERATOR] == "known"
    run(folder / "quick.toml", "sqlite:///adopt.db", start, "search.trials=9")
    word = opened.trials[number + 1]
    assert word.state == TrialState.FAIL
    assert "no candidate" in word.user_attrs[claims.FAILURE]
