"""Other places where a value could stand without its count, or a count could be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from command import Adopt
from long_study import long_summary
from optuna.trial import TrialState
from rich.console import Console

from autodiffusion_optuna.cli import output, tables
from autodiffusion_optuna.report import dashboard
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import BASELINE_KEYS, REFERENCE_IMAGES, held_out_key
from studies import run

URL = "sqlite:///adopt.db"


def test_pruned_values_are_not_said_to_be_of_all_images(folder: Path) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2", "score.pruner=percentile", "score.rungs=[32]")
    dashboard.publish(study, URL)
    assert study.metric_names == ["FD(pixels), 64 images, fewer where pruned"]
    study.set_metric_names(["mine"])
    dashboard.publish(study, URL)
    assert study.metric_names == ["mine"]


def test_before_the_first_complete_candidate_there_is_no_best(capsys: pytest.CaptureFixture[str]) -> None:
    summary = long_summary(60)
    pruned = [trial for trial in summary.trials if trial.state == TrialState.PRUNED]
    empty = replace(summary, trials=pruned, best=None)
    assert [value for _, _, value in empty.best_by_generation()] == [None] * 3
    output.print_facts(empty)
    assert "inf" not in capsys.readouterr().out


def test_long_names_stay_whole_beside_settings_and_many_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = long_summary(60)
    assert summary.best is not None
    narrow = Console(width=80, record=True, highlight=False, markup=False)
    monkeypatch.setattr(tables, "out", narrow)
    settings = (("final", "zero"), ("guidance", 1.5), ("solver", "dpmpp_2m"))
    best = replace(summary.best, candidate=replace(summary.best.candidate, modes=(), settings=settings))
    baselines = [replace(summary.baselines[0], name=name) for name in ("uniform, solver dpmpp_2m", "uniform-trailing")]
    tables.print_table(replace(summary, best=best, baselines=baselines))
    text = narrow.export_text()
    assert "uniform, solver dpmpp_2m " in text
    assert "uniform-trailing " in text


def test_a_study_of_an_older_version_learns_the_references_count(quick: optuna.Study, adopt: Adopt) -> None:
    attr = REFERENCE_IMAGES
    quick.set_user_attr(attr, None)
    assert "of an unknown number of images" in adopt("show", "--study", "quick").out
    assert adopt("run", "--study", "quick", "--set", "search.trials=25").code == 0
    assert "of 50,000 images" in adopt("show", "--study", "quick").out


def test_the_command_that_a_warning_names_holds_the_database(folder: Path, adopt: Adopt) -> None:
    run(folder / "quick.toml", "sqlite:///other.db", "search.trials=8")
    database = ["--storage", "other.db"]
    study = output.existing("quick", "sqlite:///other.db")[1]
    key = study.user_attrs[BASELINE_KEYS]["uniform"]
    study.set_user_attr(held_out_key(key, 96, 3), HeldOut(96, (1.0, 2.0, 3.0)).to_json())
    assert read_summary(study).best is not None
    for command in ("show", "status"):
        shown = adopt(command, "--study", "quick", *database).err
        assert "adopt score --study quick --images 96 --banks 3 --storage " in shown, command


def test_the_noise_of_a_value_is_named(quick: optuna.Study, adopt: Adopt) -> None:
    shown = adopt("show", "--study", "quick").out
    assert "FD(pixels), search" in shown.splitlines()[2]
    assert "best so far, search noise (FD(pixels), 64 images)" in shown
    assert "64 images, search noise" in adopt("status", "--study", "quick").out
    assert "64 images, search noise" in adopt("studies").out
