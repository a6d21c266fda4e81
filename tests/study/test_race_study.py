"""Whole studies with the race on: interrupted ones are the same, and stopped candidates are shown as what they are."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import optuna
import pytest
from command import Adopt
from optuna.trial import TrialState

from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.search.race import RacePruner
from autodiffusion_optuna.storage.attrs import BASELINE_KEYS, CANDIDATE, SCORE, SCREEN, screen_key
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.study import components, lifecycle, loop, validation
from autodiffusion_optuna.study.starts import with_baselines
from studies import config_with, rows, run

RACE = ("score.pruner=race", "search.trials=30")
WHOLE = "sqlite:///whole.db"


@pytest.fixture(scope="module")
def raced_database(quick_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a finished study; to be copied."""
    folder = tmp_path_factory.mktemp("raced")
    run(quick_file, f"sqlite:///{folder / 'whole.db'}", *RACE)
    return folder / "whole.db"


@pytest.fixture
def raced(folder: Path, raced_database: Path) -> optuna.Study:
    for file in raced_database.parent.glob("whole.db*"):
        shutil.copy(file, folder)
    return load_study(open_storage(WHOLE), "quick")


def test_eleven_and_four_and_fifteen_are_thirty(folder: Path, raced: optuna.Study) -> None:
    for trials in (11, 15, 30):
        study = run(folder / "quick.toml", "sqlite:///parts.db", RACE[0], f"search.trials={trials}")
    assert isinstance(study.pruner, RacePruner)
    assert rows("sqlite:///parts.db", "quick") == rows(WHOLE, "quick")
    assert {t.state for t in raced.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert count_finished(raced) == 30


def test_every_trial_says_what_it_was_stopped_by(raced: optuna.Study) -> None:
    for trial in raced.trials:
        by_image = trial.system_attrs[SCREEN]
        assert len(by_image) == 16
        assert trial.intermediate_values[16] == pytest.approx(statistics.fmean(by_image), rel=1e-5)
        assert trial.user_attrs[screen_key(16)] == pytest.approx(trial.intermediate_values[16])
        score, last = trial.system_attrs[SCORE], max(trial.intermediate_values)
        assert last == (64 if trial.state == TrialState.COMPLETE else last)
        assert score["run"] + score["saved"] == 3 * last
        assert [images for images, _ in score["rungs"]] == [images for images in (32, 64) if images <= last]


def test_the_first_candidates_are_scored_in_full_and_uniform_is_one(raced: optuna.Study) -> None:
    keys = raced.user_attrs[BASELINE_KEYS]
    for trial, name in zip(raced.trials[:3], ("oss", "uniform", "gits"), strict=True):
        assert trial.state == TrialState.COMPLETE
        assert trial.user_attrs[CANDIDATE] == keys[name]


def test_a_trial_cut_short_at_a_rung_is_decided_as_if_it_had_not_been(
    folder: Path, raced: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = components.build(config_with(folder / "quick.toml", *RACE))
    database = open_storage("sqlite:///parts.db")
    study = lifecycle.open_study(parts, database)
    prune, cuts = RacePruner.prune, [0]

    def cut(self: RacePruner, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        cuts[0] += 1
        if cuts[0] % 9 == 5:
            raise KeyboardInterrupt
        return prune(self, study, trial)

    monkeypatch.setattr(RacePruner, "prune", cut)
    while count_finished(study) < 30:
        try:
            loop.work(parts, study, database)
        except KeyboardInterrupt:
            continue
    assert cuts[0] > 30
    assert rows("sqlite:///parts.db", "quick") == rows(WHOLE, "quick")


@pytest.mark.parametrize(
    "settings",
    [
        ["score.metric=kid"],
        ['sampling.solver=["ddim", "dpmpp_2m"]'],
        ["search.barrier=true"],
        ["sampling.eta=0.3"],
        ["score.screen_images=0", "score.rungs=[8, 16, 32]"],
    ],
    ids=["kid", "solvers", "barrier", "eta", "rungs alone"],
)
def test_it_works_with(folder: Path, settings: list[str]) -> None:
    study = run(folder / "quick.toml", "sqlite:///a.db", *RACE, *settings)
    states = [t.state for t in study.trials]
    assert set(states) <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert states.count(TrialState.COMPLETE) >= 3
    if "search.barrier=true" in settings:
        assert isinstance(study.pruner, RacePruner)
        assert study.pruner.generation == 6
        assert set(states[:6]) == {TrialState.COMPLETE}  # there is no earlier generation to compare with
    screened = all(len(t.intermediate_values) and min(t.intermediate_values) == 16 for t in study.trials)
    assert screened == (settings[0] not in ("sampling.eta=0.3", "score.screen_images=0"))


def test_show_says_what_the_race_did(raced: optuna.Study, adopt: Adopt) -> None:
    summary = read_summary(raced)
    race = summary.race
    assert race is not None
    assert [(rung.images, rung.screen) for rung in race.rungs] == [(16, True), (32, False)]
    assert race.rungs[0].reached == 30
    assert race.rungs[1].reached == 30 - race.rungs[0].stopped
    assert race.complete == 30 - race.rungs[0].stopped - race.rungs[1].stopped
    assert race.evaluations == pytest.approx(summary.total("run") / 30)
    correlations = [rung.rank_correlation for rung in race.rungs]
    assert all(c is not None and 0 < c <= 1 for c in correlations)
    shown = adopt("show", "--study", "quick", "--storage", "whole.db").out
    assert race.text() in shown
    assert f"{race.rungs[0].stopped} of 30 stopped by the screen of 16 images (rank correlation 0." in race.text()
    printed = json.loads(adopt("show", "--study", "quick", "--storage", "whole.db", "--json").out)
    assert printed["race"] == json.loads(json.dumps(race.to_json()))


def test_a_stopped_baseline_has_no_value_and_says_where_it_was_stopped(raced: optuna.Study, adopt: Adopt) -> None:
    states = {t.user_attrs[CANDIDATE]: t for t in raced.trials}
    summary = read_summary(raced)
    stopped = [row for row in summary.baselines if row.stopped is not None]
    assert stopped, "the race should have stopped one of the baselines"
    for row in stopped:
        trial = states[row.candidate.key]
        assert trial.state == TrialState.PRUNED
        assert row.value is None
        assert row.value_text == f"stopped at {max(trial.intermediate_values)}"
    shown = adopt("show", "--study", "quick", "--storage", "whole.db").out
    assert f"stopped at {stopped[0].stopped}" in shown


def test_the_best_other_baseline_is_a_complete_one_or_came_farthest(
    folder: Path, raced: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = components.build(config_with(folder / "quick.toml", *RACE))
    parts = with_baselines(built, raced.user_attrs[BASELINE_KEYS])
    names = list(validation.to_validate(parts, raced))
    assert names[0] == "uniform"
    assert names[-1] == "best"
    others = [row for row in read_summary(raced).rows()[1:] if row.name != "uniform"]
    complete = [row for row in others if row.value is not None]
    assert names[1] == min(complete, key=lambda row: row.value or 0).name
    monkeypatch.setattr(
        validation, "values_by_key", lambda study: {parts.baselines["uniform"].key: 1.0}
    )  # as if all others had been stopped
    stopped = [row for row in others if row.stopped]
    farthest = validation.to_validate(parts, raced)
    assert list(farthest)[1] in {row.name for row in stopped if row.stopped == max(r.stopped or 0 for r in stopped)}
