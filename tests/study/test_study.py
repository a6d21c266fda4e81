"""Studies on the analytic mixture: run, stop, kill, resume, report, export."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from command import Adopt
from optuna.trial import TrialState
from PIL import Image

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import StudyError
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import BASELINE, CANDIDATE, FAILURE, OWNER, RETRIES, SCORE
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.lease import MAX_RETRIES, owner, reclaim, release
from autodiffusion_optuna.storage.manage import delete_study, rename_study
from autodiffusion_optuna.storage.studies import load_study, study_names
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.study import components, lifecycle, loop, validation
from studies import Row, config_with, rows, run


@pytest.fixture
def undisturbed(folder: Path) -> list[Row]:
    run(folder / "quick.toml", "sqlite:///whole.db")
    return rows("sqlite:///whole.db", "quick")


def test_three_resumed_parts_equal_one_run(folder: Path, undisturbed: list[Row]) -> None:
    for trials in (9, 13, 24):
        run(folder / "quick.toml", "sqlite:///parts.db", f"search.trials={trials}")
    assert rows("sqlite:///parts.db", "quick") == undisturbed


def test_baselines_come_first_and_are_named(folder: Path, undisturbed: list[Row]) -> None:
    report = read_summary(load_study(open_storage("sqlite:///whole.db"), "quick"))
    assert report.baselines[0].name == "oss"
    assert undisturbed[0][2] == report.baselines[0].candidate.key
    assert undisturbed[1][2] == "666,333,0"
    assert all(baseline.value is not None for baseline in report.baselines)
    assert report.best is not None
    assert report.best.value <= min(baseline.value for baseline in report.baselines if baseline.value is not None)


def test_ctrl_c_puts_the_running_trial_back(
    folder: Path, undisturbed: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    database = open_storage("sqlite:///stopped.db")
    opened = lifecycle.open_study(parts, database)
    score, calls = parts.evaluator.score.__func__, []  # type: ignore[attr-defined]

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    monkeypatch.setattr(type(parts.evaluator), "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.work(parts, opened, database)
    states = [state for _, state, _, _ in rows("sqlite:///stopped.db", "quick")]
    assert states.count("COMPLETE") == 11
    assert "RUNNING" not in states
    monkeypatch.undo()
    os.chdir(folder)
    run(folder / "quick.toml", "sqlite:///stopped.db")
    assert rows("sqlite:///stopped.db", "quick") == undisturbed


def test_killed_at_random_moments_and_resumed_equals_undisturbed(folder: Path) -> None:
    """kill -9 at three random moments, in processes of their own."""
    rng = random.Random(1)
    settings = ["--study", "quick.toml", "--storage", "killed.db", "--set", "search.trials=160"]
    command = [sys.executable, "-m", "autodiffusion_optuna", "run", *settings]
    killed = 0
    for kill in range(3):
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        # Printed when the first trial is about to be asked for; before it, what starts cost.
        if any("starting" in line or "going on" in line for line in iter(process.stdout.readline, "")):
            if kill == 2:  # on a loaded machine none may have been finished yet
                while not count_finished(load_study(open_storage("sqlite:///killed.db"), "quick")):
                    time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        process.communicate()
    assert killed == 3
    assert 0 < len([r for r in rows("sqlite:///killed.db", "quick") if r[1] == "COMPLETE"]) < 160
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    assert any(RETRIES in t.user_attrs for t in load_study(open_storage("sqlite:///killed.db"), "quick").trials)
    run(folder / "quick.toml", "sqlite:///whole.db", "search.trials=160")
    assert rows("sqlite:///killed.db", "quick") == rows("sqlite:///whole.db", "quick")


def test_a_study_killed_while_it_was_begun_is_begun_in_full(folder: Path, undisturbed: list[Row]) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    database = open_storage("sqlite:///half.db")
    half = optuna.create_study(study_name="quick", storage=database)
    first = Candidate.from_key(undisturbed[0][2])
    half.enqueue_trial(parts.space.encode(first), user_attrs={BASELINE: "oss"})
    run(folder / "quick.toml", "sqlite:///half.db")
    assert rows("sqlite:///half.db", "quick") == undisturbed


def test_killed_at_any_write_of_its_beginning_a_study_is_begun_in_full(
    folder: Path, adopt: Adopt, undisturbed: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run gets one write further than the one before it."""
    real, allowed = optuna.Study.set_user_attr, [0]

    def limited(self: optuna.Study, key: str, value: Any) -> None:
        if allowed[0] == 0:
            raise KeyboardInterrupt
        allowed[0] -= 1
        real(self, key, value)

    parts = components.build(config_with(folder / "quick.toml"))
    monkeypatch.setattr(optuna.Study, "set_user_attr", limited)
    for writes in range(50):
        allowed[0] = writes
        try:
            lifecycle.open_study(parts, open_storage("sqlite:///cut.db"))
        except KeyboardInterrupt:
            assert adopt("show", "--study", "quick", "--storage", "cut.db").code in (0, 1)
        else:
            break
    assert 5 < writes < 49
    monkeypatch.undo()
    os.chdir(folder)
    assert adopt("run", "--study", "quick.toml", "--storage", "cut.db").code == 0
    assert rows("sqlite:///cut.db", "quick") == undisturbed


def test_stopped_while_scoring_on_held_out_noise_it_scores_the_rest(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = validation.score_held_out, []

    def stopped(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(validation, "score_held_out", stopped)
    result = adopt("run", "--study", "quick.toml")
    assert result.code == 130
    assert "adopt run --study quick.toml" in result.err
    monkeypatch.undo()
    os.chdir(folder)
    assert adopt("run", "--study", "quick.toml", "--storage", "adopt.db").code == 0
    report = read_summary(load_study(open_storage("sqlite:///adopt.db"), "quick"))
    assert report.best is not None
    assert report.best.held_out is not None
    assert sum(baseline.held_out is not None for baseline in report.baselines) == 2
    whole = adopt("run", "--study", "quick.toml", "--storage", "whole.db")
    assert whole.code == 0
    undisturbed = read_summary(load_study(open_storage("sqlite:///whole.db"), "quick"))
    for ours, theirs in zip(report.rows(), undisturbed.rows(), strict=True):
        assert ours.held_out == theirs.held_out
    assert report.headline is not None
    assert undisturbed.headline is not None
    assert report.headline.text() == undisturbed.headline.text()
    assert report.many_steps is not None
    assert undisturbed.many_steps is not None
    assert report.many_steps.held_out == undisturbed.many_steps.held_out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_renamed_while_its_winner_is_scored_a_study_is_shown_under_its_new_name(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    score = validation.score_held_out

    def rename_and_score(*arguments: Any, **options: Any) -> HeldOut:
        if study_names(open_storage("sqlite:///adopt.db")) == ["quick"]:
            rename_study(open_storage("sqlite:///adopt.db"), "quick", "renamed")
        return score(*arguments, **options)

    monkeypatch.setattr(validation, "score_held_out", rename_and_score)
    done = adopt("run", "--study", "quick.toml", "--set", "search.trials=3", "--workers", workers)
    assert done.code == 0, done
    assert "adopt export --study renamed" in done.out
    assert study_names(open_storage("sqlite:///adopt.db")) == ["renamed"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_deleted_while_its_winner_is_scored_a_study_ends_with_one_line(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    score = validation.score_held_out

    def delete_and_score(*arguments: Any, **options: Any) -> HeldOut:
        delete_study(open_storage("sqlite:///adopt.db"), "quick")
        return score(*arguments, **options)

    monkeypatch.setattr(validation, "score_held_out", delete_and_score)
    result = adopt("run", "--study", "quick.toml", "--set", "search.trials=3", "--workers", workers)
    assert (result.code, result.err) == (1, "error: study 'quick' was deleted meanwhile, with all that it had found\n")


def test_a_trial_of_a_live_worker_is_left_alone_and_of_a_dead_one_taken_back(folder: Path) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    database = open_storage("sqlite:///a.db")
    opened = lifecycle.open_study(parts, database)
    live, dead = opened.ask(), opened.ask()
    live.set_user_attr(OWNER, owner())
    host, _, _ = owner().rsplit("/", 2)
    dead.set_user_attr(OWNER, f"{host}/999999999/1")
    assert reclaim(opened, database, opened.trials, 60) == [dead.number]
    assert opened.trials[live.number].state == TrialState.RUNNING
    assert opened.trials[dead.number].state == TrialState.WAITING
    assert opened.trials[dead.number].user_attrs[RETRIES] == 1
    release(database, live._trial_id)
    assert opened.trials[live.number].state == TrialState.WAITING


def test_a_trial_that_keeps_killing_its_worker_fails_with_the_reason(folder: Path) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    database = open_storage("sqlite:///a.db")
    opened = lifecycle.open_study(parts, database)
    host, _, _ = owner().rsplit("/", 2)
    for _ in range(MAX_RETRIES + 1):
        trial = opened.ask()
        assert trial.number == 0
        trial.set_user_attr(OWNER, f"{host}/999999999/1")
        reclaim(opened, database, opened.trials, 60)
    failed = opened.trials[0]
    assert failed.state == TrialState.FAIL
    assert "died" in failed.user_attrs[FAILURE]


def test_pruning_repeats_exactly_and_counts_towards_the_budget(folder: Path) -> None:
    rungs = ["score.rungs=[16, 32]", "score.pruner=percentile", "score.keep=0.4", "search.trials=40"]
    whole = run(folder / "quick.toml", "sqlite:///whole.db", *rungs)
    for trials in (17, 40):
        run(folder / "quick.toml", "sqlite:///parts.db", *rungs[:-1], f"search.trials={trials}")
    states = {t.state for t in whole.trials}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}
    assert count_finished(whole) == 40
    assert rows("sqlite:///parts.db", "quick") == rows("sqlite:///whole.db", "quick")
    for trial in whole.trials:
        if trial.state == TrialState.PRUNED:
            assert max(trial.intermediate_values) < 64
            assert trial.system_attrs[SCORE]["rungs"][-1][0] == max(trial.intermediate_values)


@pytest.mark.parametrize("moment", ["set_trial_state_values", "create_new_trial", "end_trial"])
def test_ctrl_c_while_a_trial_is_begun_or_ended_leaves_none_running(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    database = open_storage("sqlite:///stopped.db")
    opened = lifecycle.open_study(parts, database)
    real, calls = getattr(database, moment), []

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and moment == "end_trial":
            raise KeyboardInterrupt
        result = real(*args, **named)
        if len(calls) == 3 and moment != "end_trial":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(database, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.work(parts, opened, database)
    assert TrialState.RUNNING not in [t.state for t in opened.trials]
    assert TrialState.FAIL not in [t.state for t in opened.trials]


def test_values_that_are_not_finite_fail_with_their_reason_and_the_run_gives_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    database = open_storage("sqlite:///a.db")
    opened = lifecycle.open_study(parts, database)
    from dataclasses import replace

    real = type(parts.evaluator).score
    monkeypatch.setattr(
        type(parts.evaluator),
        "score",
        lambda *args, **kwargs: replace(real(*args, **kwargs), value=float("nan")),
    )
    with pytest.raises(StudyError, match="the distance is nan"):
        loop.work(parts, opened, database)
    assert {t.state for t in opened.trials if t.state.is_finished()} == {TrialState.FAIL}


def test_candidates_that_need_too_much_memory_fail_once_and_the_search_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = components.build(config_with(folder / "quick.toml", "search.trials=12"))
    database = open_storage("sqlite:///a.db")
    opened = lifecycle.open_study(parts, database)
    real, heavy = type(parts.evaluator).score, set()

    def score(self: Any, candidate: Any, *args: Any, **options: Any) -> Any:
        if sum(candidate.timesteps) % 3 == 0:
            heavy.add(candidate.key)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, candidate, *args, **options)

    monkeypatch.setattr(type(parts.evaluator), "score", score)
    loop.work(parts, opened, database)
    states = [t.state for t in opened.trials]
    failed = [t for t in opened.trials if t.state == TrialState.FAIL]
    assert states.count(TrialState.COMPLETE) == 12
    assert heavy
    assert {t.user_attrs[CANDIDATE] for t in failed} == heavy
    assert {t.user_attrs[FAILURE] for t in failed} == {"CUDA out of memory"}
    assert len(failed) <= 2 * len(heavy)


def test_the_whole_command_line(folder: Path, adopt: Adopt) -> None:
    first = adopt("run", "--study", "quick.toml")
    assert first.code == 0
    assert "starting" in first.out
    assert "best found" in first.out
    again = adopt("run", "--study", "quick")
    assert "is finished: 24 candidates for a budget of 24" in again.out
    longer = adopt("run", "--study", "quick.toml", "--set", "search.trials=26")
    assert "24 of 26 candidates finished, going on" in longer.out
    assert "quick" in adopt("studies").out
    check_json(json.loads(adopt("show", "--study", "quick", "--json").out))
    shown = adopt("show", "--study", "quick").out
    assert "26 of 26 candidates finished" in shown
    scored = adopt("score", "--study", "quick", "--images", "48", "--banks", "2")
    assert scored.code == 0
    assert adopt("score", "--study", "quick", "--images", "80").code == 0
    report = json.loads(adopt("show", "--study", "quick", "--json").out)
    held_out = [baseline["held_out"] for baseline in report["baselines"]]
    assert all((scores["images"], scores["banks"]) == (80, 3) for scores in held_out)


def check_json(data: dict[str, Any]) -> None:
    assert list(data) == [
        "study", "finished", "budget", "generation", "stage", "solver", "metric", "extractor", "images", "bank", "seed",
        "reference_images", "warnings", "headline", "best", "validation", "baselines", "floors", "best_by_setting",
        "ablation", "race", "evaluations", "start_evaluations", "seconds",
    ]  # fmt: skip
    assert (data["finished"], data["budget"]) == (26, 26)
    assert list(data["best"]) == [
        "trial", "timesteps", "settings", "value", "images", "bank", "held_out", "difference",
        "validation", "skips", "reuses", "variance_ratio", "cost",
    ]  # fmt: skip
    assert {(baseline["images"], baseline["bank"]) for baseline in data["baselines"]} == {(64, 0)}
    assert list(data["best"]["held_out"]) == ["mean", "low", "high", "images", "banks"]
    assert data["best"]["held_out"]["low"] < data["best"]["held_out"]["mean"] < data["best"]["held_out"]["high"]
    assert data["best"]["skips"] == [[], [], []]
    assert data["best"]["cost"] == 1.0
    assert {"uniform", "uniform-trailing", "uniform-linspace", "quadratic"} <= {k["name"] for k in data["baselines"]}
    assert set(data["evaluations"]) == {"run", "saved", "starts", "screen", "validation"}
    total = data["evaluations"]["run"] + data["evaluations"]["saved"]
    assert total == data["finished"] * 64 * 3 + data["evaluations"]["starts"]
    assert set(data["seconds"]) == {"network", "features", "distance", "storage", "starts", "screen", "total"}


def test_the_storage_of_the_environment(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADOPT_STORAGE", "other.db")
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=2").code == 0
    assert (folder / "other.db").exists()
    assert not (folder / "adopt.db").exists()


def test_a_picture_has_three_rows_of_the_same_noises(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=10").code == 0
    result = adopt("sample", "--study", "quick", "--out", "grid.png", "--images", "5", "--many-steps", "50")
    assert result.code == 0, result
    with Image.open(folder / "grid.png") as picture:
        assert picture.width > 5 * 84
        rows = (picture.height - 2 * 16 + 4) / 3 - 4
        assert 84 <= rows < 84 + 30  # as high as an image, or as its caption


def test_score_shows_the_size_that_was_asked_for(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=8").code == 0
    asked = adopt("score", "--study", "quick", "--images", "32")
    assert asked.code == 0, asked
    _, _, _, header, *lines = asked.out.splitlines()
    assert "3 x 32 images" in header
    assert all("±" in line for line in lines if line.strip() and not line.startswith("real images"))
    assert "3 x 64" in adopt("show", "--study", "quick").out
