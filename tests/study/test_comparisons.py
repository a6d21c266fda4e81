"""What a winner is compared with: its own uniform baseline, floors, the best of each solver, and itself changed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Adopt

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.evaluation.evaluator import Evaluator, Score
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance
from autodiffusion_optuna.evaluation.models.base import Floor
from autodiffusion_optuna.evaluation.references.floor import real_distance, without
from autodiffusion_optuna.evaluation.references.reference import build_reference, load_reference
from autodiffusion_optuna.report.dashboard import note_text
from autodiffusion_optuna.results import pace
from autodiffusion_optuna.results.floors import RealFloor, stored_real_floor
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.results.summary import StudySummary, read_summary
from autodiffusion_optuna.search.timesteps import uniform_timesteps
from autodiffusion_optuna.storage.attrs import SCORE
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.study import components, lifecycle, validation
from studies import config_with

SOLVERS = ["--set", 'sampling.solver=["ddim", "dpmpp_2m"]', "--set", 'sampling.final=["sigma_min", "zero"]']


def summary_of(name: str = "quick") -> StudySummary:
    return read_summary(load_study(open_storage("sqlite:///adopt.db"), name))


def test_where_solvers_are_searched_the_winner_is_compared_with_uniform_of_its_own(folder: Path, adopt: Adopt) -> None:
    ran = adopt("run", "--study", "quick.toml", *SOLVERS)
    assert ran.code == 0, ran
    summary = summary_of()
    headline = summary.headline
    assert summary.best is not None
    assert headline is not None
    settings = summary.best.candidate.settings
    assert headline.baseline.candidate == Candidate(uniform_timesteps(1000, 3), settings=settings)
    assert headline.difference is not None
    assert headline.difference.size == (64, 3)
    found, uniform = summary.best.held_out, headline.baseline.held_out
    assert found is not None
    assert uniform is not None
    pairs = zip(found.values, uniform.values, strict=True)
    assert headline.difference.values == tuple(ours - theirs for ours, theirs in pairs)
    solver, final = summary.best.candidate.settings_dict["solver"], summary.best.candidate.settings_dict["final"]
    said = headline.text()
    assert said in " ".join(ran.out.split())
    for text in ("FD(pixels)", "3 x 64 held-out images", f"uniform, final {final}, solver {solver}"):
        assert text in said
    assert ("difference" in said) is not headline.is_baseline  # which of the two wins is the machine's
    by_solver = summary.best_by_setting()["solver"]
    assert {row.name for row in by_solver} == {"ddim", "dpmpp_2m"}
    assert by_solver[0].value == summary.best.value
    for row in by_solver:
        values = [t.values[0] for t in summary.finished if t.params["solver"] == row.name]
        assert row.value == min(values)


def test_a_baseline_that_was_no_trial_is_scored_and_kept(folder: Path, adopt: Adopt) -> None:
    settings = ["--set", "sampling.eta={min=0.0, max=1.0}", "--set", "search.warm_starts=['uniform']"]
    ran = adopt("run", "--study", "quick.toml", *settings)
    assert ran.code == 0, ran
    summary = summary_of()
    assert summary.best is not None
    eta = summary.best.candidate.settings_dict["eta"]
    assert eta != 0.5  # the default, which the baselines of the search have
    headline = summary.headline
    assert headline is not None
    assert headline.baseline.name == f"uniform, eta {eta}"
    assert headline.baseline.value is None
    assert headline.baseline.held_out is not None
    line = next(line for line in ran.out.splitlines() if line.startswith(f"uniform, eta {eta}"))
    assert line.split("±")[1].split()[1:4] == ["-", "-", "1.00"]
    shown = json.loads(adopt("show", "--study", "quick", "--json").out)
    assert shown["headline"]["baseline"] == f"uniform, eta {eta}"
    assert shown["best"]["difference"]["baseline"] == f"uniform, eta {eta}"
    assert {"mean", "low", "high", "banks", "baseline"} <= shown["best"]["difference"].keys()


def test_the_ablation_is_scored_on_the_same_banks_stored_and_shown(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", *SOLVERS).code == 0
    assert "the best found, but" not in adopt("show", "--study", "quick").out
    scored = adopt("score", "--study", "quick", "--ablation")
    assert scored.code == 0, scored
    summary = summary_of()
    assert summary.best is not None
    changes = summary.ablation
    parts = components.build(config_with(folder / "quick.toml", *SOLVERS[1::2]))
    assert {change.name for change in changes} == {u.name for u in validation.changes(parts, load_study_of())}
    for change in changes:
        again = tuple(parts.evaluator.score(change.candidate, [64], bank=bank).value for bank in (1, 2, 3))
        assert change.held_out.values == again  # the prefix cache, shared by neighbours, changes no bit
        found = summary.best.held_out
        assert found is not None
        expected = tuple(ours - theirs for ours, theirs in zip(again, found.values, strict=True))
        assert change.difference.values == expected
    means = [change.difference.mean for change in changes]
    assert means == sorted(means, reverse=True)
    shown = adopt("show", "--study", "quick").out
    assert all(change.name in shown for change in changes)
    told = json.loads(adopt("show", "--study", "quick", "--json").out)["ablation"]
    assert [row["change"] for row in told] == [change.name for change in changes]


def load_study_of() -> Any:
    return load_study(open_storage("sqlite:///adopt.db"), "quick")


def test_neighbours_of_the_ablation_share_their_first_steps(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adopt("run", "--study", "quick.toml").code == 0
    real, saved = Evaluator.score, []

    def counted(self: Evaluator, *args: Any, **options: Any) -> Score:
        score = real(self, *args, **options)
        saved.append((score.run, score.saved))
        return score

    monkeypatch.setattr(Evaluator, "score", counted)
    assert adopt("score", "--study", "quick", "--floor-steps", "0").code == 0
    assert all(kept == 0 for _, kept in saved)
    saved.clear()
    assert adopt("score", "--study", "quick", "--floor-steps", "0", "--ablation").code == 0
    assert sum(kept for _, kept in saved) > 0


def test_more_banks_score_only_what_is_missing(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "score.floor_steps=0").code == 0
    before = summary_of().best
    real, banks = Evaluator.score, []

    def counted(self: Evaluator, *args: Any, **options: Any) -> Score:
        banks.append(options["bank"])
        return real(self, *args, **options)

    monkeypatch.setattr(Evaluator, "score", counted)
    more = ["--set", "score.floor_steps=0", "--set", "score.held_out_banks=5"]
    assert adopt("run", "--study", "quick.toml", *more).code == 0
    assert sorted(banks) == [4, 4, 4, 5, 5, 5]
    after = summary_of().best
    assert before is not None
    assert after is not None
    assert before.held_out is not None
    assert after.held_out is not None
    assert after.held_out.values[:3] == before.held_out.values


def test_floors_stand_beneath_the_baselines(folder: Path, adopt: Adopt) -> None:
    ran = adopt("run", "--study", "quick.toml")
    assert ran.code == 0, ran
    assert "scoring 100 uniform steps on 3 held-out banks of 64 images" in ran.out
    summary = summary_of()
    assert summary.many_steps is not None
    assert summary.many_steps.candidate.steps == 100
    assert summary.many_steps.held_out is not None
    assert summary.best is not None
    assert summary.best.held_out is not None
    assert summary.many_steps.held_out.mean < summary.best.held_out.mean
    real = summary.real_floor
    assert real is not None
    assert real.value is not None
    assert (real.images, real.against) == (64, 49936)
    lines = adopt("show", "--study", "quick").out.splitlines()
    names = [line.split("  ")[0] for line in lines if "floor" in line]
    assert names == ["uniform, 100 steps", "real images"]
    noted = note_text(summary, "sqlite:///adopt.db").splitlines()
    assert any(
        line.startswith(f"| real images | {significant(real.value)} (1 x 64) | - | - | floor: ") for line in noted
    )
    assert any(line.startswith("| uniform, 100 steps |") for line in noted)
    none = adopt("run", "--study", "quick.toml", "--set", "name=none", "--set", "score.floor_steps=0")
    assert "scoring 100" not in none.out
    assert summary_of("none").many_steps is None


def test_a_floor_that_takes_longer_than_the_search_is_left_to_score(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "affords", lambda *_: False)
    ran = adopt("run", "--study", "quick.toml", "--set", "search.trials=9")
    assert ran.code == 0, ran
    assert "left out, it would take longer than the search: 100 uniform steps on 3 held-out banks" in ran.out
    assert "adopt score --study quick scores it" in ran.out
    assert "is finished" in adopt("run", "--study", "quick.toml", "--set", "search.trials=9").out
    assert adopt("score", "--study", "quick").code == 0
    floor = summary_of().many_steps
    assert floor is not None
    assert floor.candidate.steps == 100


def test_a_run_that_was_stopped_at_the_floor_goes_on_with_it(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(validation, "score_floor", stopped)
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=9").code == 130
    best = summary_of().best
    assert best is not None
    assert best.held_out is not None
    monkeypatch.undo()
    os.chdir(folder)
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=9", "--storage", "adopt.db").code == 0
    assert summary_of().many_steps is not None


def test_what_scoring_takes_is_told_from_the_trials(quick: Any) -> None:
    trials = read_summary(quick).trials
    measured = pace.pace_of(trials)
    assert measured is not None
    scores = [t.system_attrs[SCORE] for t in trials]
    run, saved = sum(s["run"] for s in scores), sum(s["saved"] for s in scores)
    assert run + saved == len(trials) * 64 * 3
    network = sum(s["seconds_network"] for s in scores) / run
    features = sum(s["seconds_features"] for s in scores) / (len(trials) * 64)
    assert measured.seconds(7, 10) == pytest.approx(10 * (7 * network + features))
    assert pace.pace_of([]) is None


def test_real_images_are_compared_with_the_rest_of_their_reference() -> None:
    images = torch.randint(0, 256, (300, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    extractor = load_extractor("pixels", torch.device("cpu"))
    reference = build_reference(images, extractor, "noise")
    features = extractor(images)
    part = torch.arange(50) * 300 // 50
    rest = torch.tensor([i for i in range(300) if i not in set(part.tolist())])
    expected = build_reference(images[rest], extractor, "rest")
    found = without(reference, Moments.of(features[part]))
    torch.testing.assert_close(found.mu, expected.mu)
    torch.testing.assert_close(found.sigma, expected.sigma)
    value, count, others = real_distance(reference, None, extractor, 50)
    assert (count, others) == (50, 250)
    assert value == pytest.approx(frechet_distance(features[part], expected), rel=1e-9)
    half = real_distance(reference, None, extractor, 5000)
    assert not isinstance(half, str)
    assert half[1:] == (150, 150)


def test_images_at_hand_are_embedded_again_where_the_reference_keeps_too_few(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2600, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    extractor = load_extractor("pixels", torch.device("cpu"))
    reference = load_reference(tmp_path / "images.npz", extractor)
    found = real_distance(reference, tmp_path / "images.npz", extractor, 1200)
    assert not isinstance(found, str)
    assert found[1:] == (1200, 1400)
    chosen = torch.from_numpy(images[np.arange(1200) * 2600 // 1200]).permute(0, 3, 1, 2)
    rest = without(reference, Moments.of(extractor(chosen)))
    assert found[0] == pytest.approx(frechet_distance(extractor(chosen), rest), rel=1e-9)
    why = real_distance(reference, None, extractor, 1200)
    assert isinstance(why, str)
    assert "keeps the features of" in why


def test_a_floor_that_the_model_ships_with_counts_at_its_own_number_of_images(folder: Path) -> None:
    parts = components.build(config_with(folder / "quick.toml"))
    study = lifecycle.open_study(parts, open_storage("sqlite:///adopt.db"))
    shipped = replace(parts, model=replace(parts.model, floor=Floor("pixels", {64: 1.25})))
    validation.measure_real(shipped, study)
    assert stored_real_floor(study.user_attrs) == RealFloor(1.25, 64, 50_000, "real images that trained nothing")
    more = config_with(folder / "quick.toml", "score.held_out_images=100")
    validation.measure_real(replace(shipped, config=more), study)
    measured = stored_real_floor(study.user_attrs)
    assert measured is not None
    assert (measured.images, measured.against) == (100, 49_900)
    assert measured.value != 1.25


def test_a_kernel_distance_has_no_floor_of_real_images(folder: Path) -> None:
    parts = components.build(config_with(folder / "quick.toml", 'score.metric="kid"'))
    study = lifecycle.open_study(parts, open_storage("sqlite:///adopt.db"))
    validation.measure_real(parts, study)
    floor = stored_real_floor(study.user_attrs)
    assert floor is not None
    assert floor.value is None
    assert "kernel distance" in floor.note
