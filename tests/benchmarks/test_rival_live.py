"""Live comparisons on a model without a network: the disk cache, what is counted, and going on after a kill."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import rival_live
from optuna.trial import TrialState, create_trial
from rival_live import LISTS, Bench, Live, run
from rival_samplers import ADOPT, EA
from rival_store import Key, Scored, Store

from autodiffusion_optuna import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.search.presets import settings_of
from autodiffusion_optuna.storage.attrs import CANDIDATE, SCORE
from autodiffusion_optuna.study import components

FEW = {"seeds": 2, "ea_seeds": 1, "candidates": 12, "paper": 6, "ea": 52, "ours": 6}
SMALL = Live("small", "mixture-4", images=32, held_out=16, **FEW)


class Killed(BaseException):
    """Not an error that anybody catches."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return opened_store(tmp_path)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(candidate, bank) of everything that is sampled; the list's ``kill`` is the call at which the process dies."""
    calls: list[tuple[str, int]] = []
    score = Evaluator.score

    def counted(self: Evaluator, candidate: Any, *given: Any, **named: Any) -> Any:
        calls.append((candidate.key, named.get("bank", 0)))
        return score(self, candidate, *given, **named)

    monkeypatch.setattr(Evaluator, "score", counted)
    return calls


def test_a_score_is_made_once(store: Store, tmp_path: Path) -> None:
    key, made = Key("model ddim", "3,2,1", 0, 64), []

    def make() -> Scored:
        made.append(1)
        return Scored(0.1 + 0.2, 192, 1.5)

    first = store.score(key, make)
    again = Store(tmp_path / "rivals.db").score(key, make)  # as another process sees it
    assert first == again == (0.1 + 0.2, 192, 1.5)
    assert len(made) == 1
    for other in (
        key._replace(measured="x"),
        key._replace(schedule="3,2,0"),
        key._replace(bank=1),
        key._replace(images=65),
    ):
        store.score(other, make)
    assert len(made) == 5


def test_a_choice_stays(store: Store) -> None:
    assert store.chosen("precision", lambda: "bfloat16") == "bfloat16"
    assert store.chosen("precision", lambda: "float32") == "bfloat16"


def test_methods_share_what_was_sampled_and_pay_for_it_all_the_same(
    store: Store, tmp_path: Path, sampled: list[tuple[str, int]]
) -> None:
    first = run(SMALL, "random", 0, store, tmp_path)
    before = len(sampled)
    second = run(SMALL, "TPE", 0, store, tmp_path)
    assert len(set(sampled)) == len(sampled)  # nothing twice: both begin with the same lists
    assert len(sampled) - before < 12
    for found in (first, second):
        assert found["winners"][0][0] == 4 * 32
        assert found["winners"][-1][0] == 4 * 32 * 12
        assert all(len(found["held_out"][key]) == rival_live.BANKS for _, key in found["winners"])
    assert run(SMALL, "TPE", 0, store, tmp_path) == second


def test_the_published_search_scores_each_candidate_on_noise_of_its_own(
    store: Store, tmp_path: Path, sampled: list[tuple[str, int]]
) -> None:
    found = run(SMALL, EA, 0, store, tmp_path)
    banks = [bank for _, bank in sampled if bank >= rival_live.FRESH_BANKS]
    assert len(banks) == len(set(banks)) == 52
    steps = [key.count(",") + 1 for key, bank in sampled if bank >= rival_live.FRESH_BANKS]
    assert found["winners"][-1][0] == 32 * sum(steps)  # a candidate with repeats has fewer steps


@pytest.mark.parametrize("method", ["random", ADOPT])
def test_a_killed_run_goes_on_and_ends_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: list[tuple[str, int]]
) -> None:
    whole = run(SMALL, method, 1, opened_store(tmp_path / "whole"), tmp_path / "whole")
    all_of_it = len(sampled)
    store = opened_store(tmp_path / "killed")
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "score", dying(Evaluator.score, at=4))
        with pytest.raises(Killed):
            run(SMALL, method, 1, store, tmp_path / "killed")
    assert store.run(SMALL.name, method, 1) is None
    sampled.clear()
    gone_on = run(SMALL, method, 1, store, tmp_path / "killed")
    assert gone_on["held_out"] == whole["held_out"]
    assert [key for _, key in gone_on["winners"]] == [key for _, key in whole["winners"]]
    assert len(sampled) == all_of_it - 3  # only what was cut short was sampled again


def opened_store(place: Path) -> Store:
    """With the precision chosen, which is measured otherwise."""
    opened = Store(place / "rivals.db")
    opened.chosen("precision of mixture", lambda: "float32")
    return opened


def dying(score: Callable[..., Any], at: int) -> Callable[..., Any]:
    """``Evaluator.score`` of a process that is killed at a call of it."""
    calls = itertools.count(1)

    def killed(*given: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise Killed
        return score(*given, **named)

    return killed


def test_ours_is_the_packages_own_study(store: Store, tmp_path: Path) -> None:
    bench = rival_live.opened(SMALL, ADOPT, 0, store, tmp_path)
    assert rival_live.begun(bench, 0).study.sampler.settings == settings_of("adopt")
    place = rival_live.database(SMALL, ADOPT, 0, tmp_path)
    assert (place / "adopt.db").exists()
    rival_live.forget(SMALL, ADOPT, 0, tmp_path)
    assert not place.exists()


def test_what_is_counted_of_ours() -> None:
    study = optuna.create_study()
    study.set_user_attr("start_costs", {"teacher": 100, "oss": 40})
    ends = [(9.0, TrialState.COMPLETE, 50), (None, TrialState.PRUNED, 8), (7.0, TrialState.COMPLETE, 30)]
    for number, (value, state, spent) in enumerate(ends):
        attrs = {CANDIDATE: f"{number + 1},0"}
        trial = create_trial(state=state, value=value, user_attrs=attrs, system_attrs={SCORE: {"run": spent}})
        study.add_trial(trial)
    start = rival_live.start_evaluations(study)
    assert start == 140
    assert list(rival_live.study_curve(study, start)) == [(190, "1,0"), (198, "1,0"), (228, "3,0")]


def test_lists_are_all_baselines_of_the_study(store: Store, tmp_path: Path) -> None:
    found = run(SMALL, LISTS, 0, store, tmp_path)
    assert {"uniform", "karras", "arctan"} <= found["lists"].keys() == found["evaluations"].keys()
    assert found["evaluations"]["uniform"] == 0
    assert set(found["lists"].values()) == found["held_out"].keys()


def test_another_machine_goes_on_from_the_committed_runs(
    store: Store, tmp_path: Path, sampled: list[tuple[str, int]]
) -> None:
    made = run(SMALL, "random", 0, store, tmp_path)
    store.keep(SMALL.name, "random", 1, {"winners": made["winners"]})  # not scored on held-out noise yet
    store.keep("a table", "random", 0, {"held_out": {}})
    store.write(tmp_path / "runs.jsonl", [SMALL.name])
    assert (tmp_path / "runs.jsonl").read_text().count("\n") == 1
    other = Store(tmp_path / "other" / "rivals.db")
    other.keep(SMALL.name, "random", 0, {**made, "seconds": 1.0})
    assert other.read(tmp_path / "runs.jsonl", lambda run: True) == 0
    assert other.run(SMALL.name, "random", 0) == {**made, "seconds": 1.0}  # its own stays
    fresh = Store(tmp_path / "fresh" / "rivals.db")
    assert fresh.read(tmp_path / "runs.jsonl", lambda run: run.data["precision"] == "bfloat16") == 1
    assert fresh.runs(SMALL.name) == {}
    assert fresh.read(tmp_path / "runs.jsonl", lambda run: run.data["precision"] == "float32") == 0
    sampled.clear()
    assert run(SMALL, "random", 0, fresh, tmp_path) == made
    assert sampled == []
    assert fresh.read(tmp_path / "missing.jsonl", lambda run: True) == 0


def test_a_searched_solver_shares_scores_with_that_solver_alone(store: Store, tmp_path: Path) -> None:
    keys = []
    monkeyed = SimpleNamespace(score=lambda key, make: keys.append(key))
    for solver in ('["ddim", "heun"]', '"heun"'):
        config = load_preset("mixture-4", [f"sampling.solver={solver}", "model.check=false"])
        bench = Bench(SMALL, ADOPT, monkeyed, tmp_path, components.build(config))  # type: ignore[arg-type]
        settings = (("solver", "heun"),) if "ddim" in solver else ()
        bench.score(Candidate((9, 5, 3), settings=settings), 2, 16)
    assert keys[0] == keys[1]
    assert "heun" in keys[0].measured


def test_each_solver_is_searched_alone_too() -> None:
    methods = rival_live.PROBLEMS["faces-6, solvers"].methods
    assert methods[0] == ADOPT
    assert len(methods) == 1 + len(load_preset("faces-solvers-6").sampling.solver)
    assert rival_live.PROBLEMS["digits-4"].methods[:3] == (ADOPT, LISTS, EA)
