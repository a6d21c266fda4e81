"""Finalists scored on the validation bank: run, stopped, resumed, by two workers; and every view of the winner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from command import Adopt

import autodiffusion_optuna as adopt_api
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import VALIDATION_BANK
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.report.dashboard import note_text
from autodiffusion_optuna.report.figures import timesteps
from autodiffusion_optuna.report.page import page
from autodiffusion_optuna.results.finalists import best_candidate, read_finalists
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import CONFIG, VALIDATION, validation_key
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.study import components, lifecycle, pictures, validation
from studies import config_with, rows, run

URL = "sqlite:///adopt.db"
THREE = ["--set", "score.finalists=3"]


def stored(url: str, name: str = "quick") -> dict[str, Any]:
    """Validation values of a study, at each number of images."""
    attrs = load_study(open_storage(url, create=False), name).user_attrs
    return {key: score.get("rungs") for key, score in attrs.items() if key.startswith(f"{VALIDATION}:")}


@pytest.fixture
def overturned(quick: optuna.Study) -> optuna.Study:
    """A finished study whose second best candidate in the search wins on the validation bank."""
    config = quick.user_attrs[CONFIG]
    quick.set_user_attr(CONFIG, {**config, "score": {**config["score"], "finalists": 3}})
    for finalist, value in zip(read_finalists(quick).all, (30.0, 10.0, 20.0), strict=True):
        score = {"rungs": [[64, value + 1], [128, value]], "run": 768, "saved": 0}
        quick.set_user_attr(validation_key(finalist.candidate.key, 128), score)
    return quick


def test_a_finished_study_is_validated_when_it_is_run_with_finalists(quick: optuna.Study, adopt: Adopt) -> None:
    parts = components.build(config_with(Path("quick.toml")))
    ran = adopt("run", "--study", "quick", *THREE)
    assert ran.code == 0, ran
    assert "scoring 3 finalists on 128 validation images" in ran.out
    summary = read_summary(quick)
    assert summary.finalists.complete
    assert summary.best is not None
    assert summary.best.held_out is not None
    for finalist in summary.finalists.all:
        own = parts.evaluator.score(finalist.candidate, [64, 128], bank=VALIDATION_BANK, cached=False)
        assert finalist.stored["rungs"] == [list(rung) for rung in own.rungs]
    best = min(summary.finalists.all, key=lambda finalist: finalist.stored["rungs"][-1][1])
    assert (summary.best.candidate.key, summary.best.validated) == (best.candidate.key, best.validated)
    again = adopt("run", "--study", "quick")
    assert "is finished" in again.out
    assert "scoring" not in again.out


def test_more_trials_validate_the_new_finalists_alone(
    quick: optuna.Study, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adopt("run", "--study", "quick", *THREE).code == 0
    before, scored, real = stored(URL), list[str](), Evaluator.score

    def noted(self: Evaluator, candidate: Candidate, *arguments: Any, **options: Any) -> Any:
        if options.get("bank") == VALIDATION_BANK:
            scored.append(candidate.key)
        return real(self, candidate, *arguments, **options)

    monkeypatch.setattr(Evaluator, "score", noted)
    assert adopt("run", "--study", "quick", "--set", "search.trials=36").code == 0
    after, chosen = stored(URL), read_finalists(quick)
    assert chosen.complete
    assert {key: after[key] for key in before} == before
    assert scored == [f.candidate.key for f in sorted(chosen.all, key=lambda f: f.searched) if
                      validation_key(f.candidate.key, 128) not in before]  # fmt: skip
    assert scored


def test_another_number_of_validation_images_scores_all_again(quick: optuna.Study, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick", *THREE).code == 0
    first = stored(URL)
    assert adopt("run", "--study", "quick", "--set", "score.validation_images=64").code == 0
    assert len(stored(URL)) == 2 * len(first) == 6
    assert all(finalist.optimism == finalist.validated - finalist.searched
               for finalist in read_finalists(quick).all if finalist.validated is not None)  # fmt: skip


def test_killed_at_any_write_of_its_end_a_study_ends_the_same(
    quick: optuna.Study, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run gets one write further than the one before it."""
    config = config_with(Path("quick.toml"), "score.finalists=3", "score.floor_steps=0")
    parts = components.build(config)
    study = lifecycle.open_study(parts, open_storage(URL))
    real, allowed, shown, stops = optuna.Study.set_user_attr, [0], set[bool](), 0

    def limited(self: optuna.Study, key: str, value: Any) -> None:
        if allowed[0] == 0:
            raise KeyboardInterrupt
        allowed[0] -= 1
        real(self, key, value)

    for _ in range(50):
        allowed[0] = 1
        try:
            with monkeypatch.context() as patch:
                patch.setattr(optuna.Study, "set_user_attr", limited)
                validation.validate(parts, study)
        except KeyboardInterrupt:
            stops += 1
            shown.add(json.loads(adopt("show", "--study", "quick", "--json").out)["validation"]["complete"])
        else:
            break
    assert stops >= 3
    assert shown == {False, True}
    cut = stored(URL), best_candidate(study)
    for key in cut[0]:
        study.set_user_attr(key, {})
    validation.validate(parts, study)
    assert cut == (stored(URL), best_candidate(study))


def test_two_workers_that_end_together_see_one_winner(quick: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one scores a finalist the other stores its own value of it: the first value that is stored stays."""
    parts = components.build(config_with(Path("quick.toml"), "score.finalists=3"))
    study = lifecycle.open_study(parts, open_storage(URL))
    others = lifecycle.open_study(parts, open_storage(URL))
    real, calls = Evaluator.score, list[str]()

    def beside(self: Evaluator, candidate: Candidate, *arguments: Any, **options: Any) -> Any:
        calls.append(candidate.key)
        score = real(self, candidate, *arguments, **options)
        if len(calls) == 1:
            for finalist in read_finalists(others).all:
                said = {"rungs": [[64, 3.0], [128, 2.0]], "run": 1, "saved": 0}
                others.set_user_attr(validation_key(finalist.candidate.key, 128), said)
        return score

    monkeypatch.setattr(Evaluator, "score", beside)
    validation.score_finalists(parts, study)
    assert len(calls) == 1
    assert {finalist.validated for finalist in read_finalists(study).all} == {2.0}


def test_workers_leave_a_validated_study(folder: Path, adopt: Adopt) -> None:
    few = ["--set", "search.trials=5", "--set", "score.floor_steps=0", *THREE]
    assert adopt("run", "--study", "quick.toml", *few, "--workers", "2", "--storage", "two.db").code == 0
    study = load_study(open_storage("sqlite:///two.db"), "quick")
    assert read_finalists(study).complete
    summary = read_summary(study)
    assert summary.best is not None
    assert summary.best.held_out is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError()])
def test_a_finalist_that_cannot_be_scored_does_not_win(
    quick: optuna.Study, adopt: Adopt, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    lead, real = best_candidate(quick), Evaluator.score

    def failing(self: Evaluator, candidate: Candidate, *arguments: Any, **options: Any) -> Any:
        if options.get("bank") == VALIDATION_BANK and candidate.key == lead.key:
            raise error
        return real(self, candidate, *arguments, **options)

    monkeypatch.setattr(Evaluator, "score", failing)
    ran = adopt("run", "--study", "quick", *THREE)
    assert ran.code == 0, ran
    assert "is a finalist without a validation score" in ran.err
    assert best_candidate(quick) != lead
    assert "is finished" in adopt("run", "--study", "quick").out
    assert [finalist.candidate for finalist in read_finalists(quick).due] == [lead]


def test_every_view_follows_the_winner_of_validation(overturned: optuna.Study, adopt: Adopt) -> None:
    values = sorted(row[3] for row in rows(URL, "quick") if row[3] is not None)
    winner = next(row for row in rows(URL, "quick") if row[3] == values[1])
    candidate = Candidate.from_key(winner[2])
    assert best_candidate(overturned) == candidate
    shown = json.loads(adopt("show", "--study", "quick", "--json").out)
    assert (shown["best"]["trial"], shown["best"]["value"], shown["best"]["validation"]) == (winner[0], values[1], 10.0)
    assert shown["headline"]["found"] == values[1]  # it has no held-out values yet
    optimism = [finalist["optimism"] for finalist in shown["validation"]["finalists"]]
    assert optimism[0] == pytest.approx(11.0 - values[1])
    assert shown["validation"]["optimism"] == pytest.approx(sum(optimism) / 3)
    assert [finalist["validation"] for finalist in shown["validation"]["finalists"]] == [10.0, 20.0, 30.0]
    assert shown["validation"]["bank"] == VALIDATION_BANK
    exported = json.loads(adopt("export", "--study", "quick", "--format", "json").out)
    assert tuple(exported["timesteps"]) == candidate.timesteps
    assert adopt_api.load_study("quick", "adopt.db").best_schedule.timesteps == candidate.timesteps
    parts, summary = components.build(config_with(Path("quick.toml"))), read_summary(overturned)
    assert candidate in [drawn for _, drawn in pictures.rows_of(parts, summary)]
    assert validation.to_validate(parts, overturned)["best"] == candidate
    text = " ".join(map(str, candidate.timesteps))
    table = adopt("show", "--study", "quick").out
    assert next(line for line in table.splitlines() if line.startswith("best found")).rstrip().endswith(text)
    assert "best of 3 finalists on validation noise" in table
    assert f"trial {winner[0]}" in table
    assert f"**best found** (trial {winner[0]})" in note_text(summary, URL)
    assert "Best of 3 finalists on validation noise" in note_text(summary, URL)
    assert '<h3 class="table">The finalists</h3>' in page(summary)
    drawn = timesteps(summary)
    assert drawn is not None
    assert tuple(next(row.x for row in drawn.data if row.name == "result")) == candidate.timesteps
    status = json.loads(adopt("status", "--study", "quick", "--json").out)
    assert (status["best"], status["images"], status["bank"]) == (10.0, 128, VALIDATION_BANK)
    assert "validation: 3 of 3 finalists are scored" in adopt("status", "--study", "quick").out
    assert "10 (FD(pixels), 128 images, validation noise)" in adopt("studies").out


def test_scores_on_held_out_noise_are_the_winners(overturned: optuna.Study, adopt: Adopt) -> None:
    ran = adopt("run", "--study", "quick", "--set", "score.floor_steps=0")
    assert ran.code == 0, ran
    summary = read_summary(overturned)
    assert summary.best is not None
    assert summary.best.held_out is not None
    assert summary.lead is not None
    assert summary.best.value > summary.lead[0]


def test_validation_counts_in_the_evaluations(overturned: optuna.Study, adopt: Adopt) -> None:
    summary = read_summary(overturned)
    assert summary.evaluations["run"] == summary.total("run") + summary.evaluations["starts"] + 3 * 768
    shown = json.loads(adopt("show", "--study", "quick", "--json").out)
    assert shown["evaluations"] == summary.evaluations
    assert "2,304 to validate finalists" in adopt("show", "--study", "quick").out


def test_a_search_that_stopped_is_best_by_the_searchs_values(folder: Path, adopt: Adopt) -> None:
    run(folder / "quick.toml", URL, "search.trials=8", "score.finalists=3")
    shown = adopt("show", "--study", "quick").out
    assert "best by the search's own values: 0 of 3 finalists are scored on validation noise" in shown
    assert "search noise" in adopt("status", "--study", "quick").out
    value = min(row[3] for row in rows(URL, "quick") if row[3] is not None)
    assert json.loads(adopt("show", "--study", "quick", "--json").out)["best"]["value"] == value


def test_preset_paper_ends_as_it_did(folder: Path, adopt: Adopt) -> None:
    paper = folder / "paper.toml"
    text = (folder / "quick.toml").read_text().replace("finalists = 0\n", "")
    paper.write_text(text.replace("[search]\n", '[search]\npreset = "paper"\n').replace("trials = 24", "trials = 8"))
    ran = adopt("run", "--study", "paper.toml", "--set", "score.floor_steps=0")
    assert ran.code == 0, ran
    assert "finalist" not in ran.out
    assert not stored(URL, "paper")
    assert json.loads(adopt("show", "--study", "paper", "--json").out)["validation"] is None


def test_the_cost_line_counts_the_finalists(folder: Path, adopt: Adopt) -> None:
    said = adopt("run", "--study", "quick.toml", "--dry-run", *THREE).out
    assert "of validation (3 finalists, 1,152 network evaluations) and " in said
