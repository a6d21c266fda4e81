"""Starts that are computed from the model: once, counted, stored, and read by whoever comes later."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from command import Adopt
from optuna.trial import TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.cli.output import load_components, load_image_components
from autodiffusion_optuna.errors import ModelError, StatisticsError
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.noise import NoiseSchedule, cosine, flow, linear
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.search import timesteps
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.timesteps import log_snr
from autodiffusion_optuna.storage.attrs import BASELINE, BASELINE_KEYS, CANDIDATE, OPERATOR, START_COSTS, START_SECONDS
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.study import components, lifecycle, loop, starts
from autodiffusion_optuna.study.starts import compute_starts, plan_starts
from studies import begin, config_with, run

URL = "sqlite:///starts.db"
SCREENED = ("score.pruner=race", "score.screen_images=16")


def built(folder: Path, *settings: str) -> components.StudyComponents:
    return components.build(config_with(folder / "quick.toml", *settings))


def computed(folder: Path, *settings: str) -> starts.Starts:
    parts = built(folder, *settings)
    plan = plan_starts(parts)
    assert plan is not None
    found = compute_starts(parts, plan)
    assert found.costs == plan.costs
    assert all(parts.space.is_canonical(candidate) for candidate in found.candidates.values())
    return found


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every teacher that is run."""
    calls, real = list[int](), starts.run_teacher

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(starts, "run_teacher", counted)
    return calls


def test_they_are_computed_once_and_evaluated_first(folder: Path, adopt: Adopt, teachers: list[int]) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2")
    names = [t.user_attrs[BASELINE] for t in study.trials]
    assert names[:2] == ["oss", "uniform"]
    assert "gits" in names
    keys = study.user_attrs[BASELINE_KEYS]
    again = run(folder / "quick.toml", URL, "search.trials=3")
    assert again.user_attrs[BASELINE_KEYS] == keys
    assert adopt("score", "--study", "quick", "--storage", URL, "--images", "8", "--banks", "2").code == 0
    assert len(teachers) == 1
    for load in (load_components, load_image_components):
        assert {name: c.key for name, c in load("quick", URL, False)[1].baselines.items()} == keys
    opened = lifecycle.open_run(config_with(folder / "quick.toml"), URL)
    assert opened.components.baselines["oss"].key == keys["oss"]
    assert len(teachers) == 1


def test_closed_forms_come_between_children(folder: Path) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=24", "search.population=20")
    names = {t.number: t.user_attrs[BASELINE] for t in study.trials if BASELINE in t.user_attrs}
    assert [names[n] for n in range(3)] == ["oss", "uniform", "gits"]
    assert all(n % 2 == 0 for n in list(names)[3:])
    keys = {t.number: t.user_attrs[CANDIDATE] for t in study.trials}
    known = study.user_attrs[BASELINE_KEYS]
    assert {keys[n] for n in names} == set(known.values())  # each is tried, those that two names share once
    assert all(keys[n] == known[name] for n, name in names.items())
    assert {study.trials[n].user_attrs[OPERATOR] for n in names} == {"baseline"}
    assert {study.trials[n].user_attrs[OPERATOR] for n in (3, 5, 7)} == {"mutation"}  # of the first, not of chance


def test_those_that_were_asked_for_by_name_all_come_first(folder: Path) -> None:
    wanted = ["karras", "gits", "uniform", "log-snr"]
    study = run(folder / "quick.toml", URL, "search.trials=8", f"search.warm_starts={wanted}")
    assert [t.user_attrs.get(BASELINE) for t in study.trials] == [*wanted, *[None] * 4]


def test_a_start_that_fails_is_not_tried_again_and_the_study_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Evaluator.score

    def fails_at_the_end(self: Evaluator, candidate: Candidate, *given: Any, **named: Any) -> Any:
        if candidate.timesteps[0] == 999:
            raise StatisticsError("features hold NaN or infinity")
        return score(self, candidate, *given, **named)

    monkeypatch.setattr(Evaluator, "score", fails_at_the_end)
    study = run(folder / "quick.toml", URL, "search.trials=30")
    failed = [t for t in study.trials if t.state == TrialState.FAIL and BASELINE in t.user_attrs]
    keys = [t.user_attrs[CANDIDATE] for t in failed]
    assert len(keys) == len(set(keys)) >= 5
    assert sum(t.state == TrialState.COMPLETE for t in study.trials) > 10


def test_the_starts_of_a_study_are_those_that_it_was_begun_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = begin(folder, URL, "search.trials=24")
    known = dict(study.user_attrs[BASELINE_KEYS])
    monkeypatch.setitem(timesteps.BASELINES, "dmn", lambda schedule, steps: (998, 500, 3)[:steps])
    run(folder / "quick.toml", URL, "search.trials=24")
    tried = {t.user_attrs[BASELINE]: t.user_attrs[CANDIDATE] for t in study.trials if BASELINE in t.user_attrs}
    assert tried["dmn"] == known["dmn"] != "998,500,3"


def test_what_they_cost_is_part_of_the_total(folder: Path, adopt: Adopt) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2")
    costs = study.user_attrs[START_COSTS]
    assert costs == {"teacher": 25 * 8, "oss": 8 * 3 * 23, "gits": 0}
    summary = read_summary(study)
    spent = sum(costs.values())
    assert summary.to_json()["evaluations"] == {
        "run": int(summary.total("run")) + spent,
        "saved": int(summary.total("saved")),
        "starts": spent,
        "screen": 0,
        "validation": 0,
    }
    assert summary.to_json()["start_evaluations"] == costs
    assert (
        f"({spent:,} for the starts: teacher 200, oss 552, gits 0)"
        in adopt("show", "--study", "quick", "--storage", URL).out
    )


def test_the_screens_teacher_has_a_name_of_its_own(folder: Path, adopt: Adopt) -> None:
    alone = "search.warm_starts=['uniform']"
    study = run(folder / "quick.toml", URL, "search.trials=2", *SCREENED, alone)
    assert study.user_attrs[START_COSTS] == {"screen": 16 * 16}
    assert read_summary(study).evaluations["starts"] == 0
    assert "(256 for the screen's teacher)" in adopt("show", "--study", "quick", "--storage", URL).out
    both = run(folder / "quick.toml", "sqlite:///both.db", "search.trials=2", *SCREENED)
    evaluations = read_summary(both).to_json()["evaluations"]
    assert (evaluations["starts"], evaluations["screen"]) == (752, 256)
    assert evaluations["run"] == read_summary(both).total("run") + 752 + 256
    shown = adopt("show", "--study", "quick", "--storage", "both.db").out
    assert "(752 for the starts: teacher 200, oss 552, gits 0; 256 for the screen's teacher)" in shown


def test_a_teacher_that_ran_again_is_counted_again(folder: Path) -> None:
    first = read_summary(run(folder / "quick.toml", URL, "search.trials=2", *SCREENED))
    second = read_summary(run(folder / "quick.toml", URL, "search.trials=3", *SCREENED))
    assert (first.evaluations["screen"], second.evaluations["screen"]) == (256, 512)
    assert second.start_seconds["screen"] > first.start_seconds["screen"] > 0
    assert second.evaluations["starts"] == first.evaluations["starts"]


def test_the_seconds_of_what_comes_first_are_part_of_the_total(folder: Path, adopt: Adopt) -> None:
    study = run(folder / "quick.toml", URL, "search.trials=2", *SCREENED)
    first = study.user_attrs[START_SECONDS]
    assert first["starts"] > 0
    assert first["screen"] > 0
    summary = read_summary(study)
    seconds = summary.to_json()["seconds"]
    assert {phase: seconds[phase] for phase in first} == pytest.approx(first, abs=1e-3)
    assert seconds["total"] == pytest.approx(summary.wall_seconds + sum(first.values()), abs=2e-3)
    shown = adopt("show", "--study", "quick", "--storage", URL).out
    assert f"starts {first['starts']:.1f}, screen {first['screen']:.1f}, total" in shown
    again = run(folder / "quick.toml", URL, "search.trials=3", *SCREENED)
    seconds = again.user_attrs[START_SECONDS]
    assert seconds["starts"] == first["starts"]
    assert seconds["screen"] > first["screen"]  # the teacher ran again
    unscreened = run(folder / "quick.toml", "sqlite:///none.db", "search.trials=2")
    assert unscreened.user_attrs[START_SECONDS].keys() == {"starts"}


def test_where_memory_runs_out_nothing_is_written_and_other_settings_may_be_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise ModelError("the device ran out of memory with a single image")

    with monkeypatch.context() as patched:
        patched.setattr(starts, "run_teacher", fails)
        with pytest.raises(ModelError):
            lifecycle.open_run(config_with(folder / "quick.toml"), URL)
    storage = open_storage(URL)
    left = optuna.load_study(study_name="quick", storage=storage)
    assert (left.user_attrs, left.trials) == ({}, [])
    opened = lifecycle.open_run(config_with(folder / "quick.toml", "score.images=32"), URL)
    assert "oss" in opened.study.user_attrs[BASELINE_KEYS]


def test_a_run_and_a_dry_run_say_what_they_cost(folder: Path, adopt: Adopt) -> None:
    dry = adopt("run", "--study", "quick.toml", "--dry-run")
    assert "24 candidates + 752 of the starts = 5,360 network evaluations" in dry.out
    first = adopt("run", "--study", "quick.toml", "--set", "search.trials=1")
    line = "computing where the search starts (oss and gits), from 8 images of 25 steps: 752 network evaluations"
    assert line in first.out
    again = adopt("run", "--study", "quick.toml", "--set", "search.trials=2")
    assert "computing" not in again.out


def test_they_say_what_the_screens_teacher_costs_too(folder: Path, adopt: Adopt) -> None:
    screened = [word for setting in SCREENED for word in ("--set", setting)]
    dry = adopt("run", "--study", "quick.toml", "--dry-run", *screened)
    parts = "24 candidates + 752 of the starts + 256 of the screen's teacher"
    assert f"{parts} = {24 * 3 * 64 + 752 + 256:,} network evaluations" in dry.out
    ran = adopt("run", "--study", "quick.toml", *screened, "--set", "search.trials=1")
    line = "752 network evaluations, as many as 3.9 candidates have; then 256 for the screen's teacher\n"
    assert line in ran.out
    assert "1 candidate + 256 of the screen's teacher = 448 network evaluations" in ran.out


def test_workers_say_it_on_stderr_without_calling_it_a_warning(folder: Path) -> None:
    command = [sys.executable, "-m", "autodiffusion_optuna", "run", "--study", "quick.toml", "--workers", "2"]
    few = ["--set", "search.trials=2", "--set", "score.held_out_images=4"]
    ran = subprocess.run([*command, *few], capture_output=True, text=True, check=True)
    assert [line for line in ran.stderr.splitlines() if "computing" in line] == [
        "computing where the search starts (oss and gits), from 8 images of 25 steps: 752 network evaluations, as many "
        "as 3.9 candidates have"
    ]


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ([], 16),
        (["sampling.steps=20"], 40),
        (["sampling.steps=20", "sampling.solver=heun"], 78),  # 39 evaluations
        (["sampling.steps={min=2, max=20}", "sampling.solver=['ddim', 'heun']", "search.max_cost=1"], 40),  # 19 of heun
        (["sampling.steps=600", "sampling.solver=dpmpp_2m"], 1000),
    ],
)
def test_the_screens_teacher_has_more_steps_than_candidates(folder: Path, settings: list[str], points: int) -> None:
    parts = built(folder, *SCREENED, *settings)
    assert parts.evaluator.screen_timesteps == log_snr(parts.model.schedule, points)
    assert starts.screen_costs(parts) == {"screen": points * 16}


@pytest.mark.parametrize(
    ("schedule", "points"),
    [(linear(), 16), (cosine(), 25), (flow(), 23), (flow(T=12), 9), (linear(T=6), 6)],
    ids=["linear", "cosine", "flow", "a flow of few times", "no more than there are"],
)
def test_the_wider_the_noise_levels_the_more_steps_it_has(schedule: NoiseSchedule, points: int) -> None:
    assert starts.screen_timesteps(SearchSpace(schedule.T, 4, 4), schedule) == log_snr(schedule, points)


def test_a_share_of_a_candidate_is_of_its_network_evaluations(folder: Path) -> None:
    plan = plan_starts(built(folder, "sampling.solver=heun", "sampling.steps=6"))
    assert plan is not None
    assert plan.candidate == 11 * 64


@pytest.mark.parametrize(
    "setting", ["search.warm_starts=['uniform']", "search.warm_starts=false", "search.preset=paper"]
)
def test_nothing_is_computed_that_nobody_asked_for(folder: Path, teachers: list[int], setting: str) -> None:
    study = begin(folder, URL, setting)
    assert not teachers
    assert START_COSTS not in study.user_attrs
    assert not {"oss", "gits"} & study.user_attrs[BASELINE_KEYS].keys()
    assert read_summary(study).evaluations["starts"] == 0


def test_one_may_be_asked_for_alone(folder: Path) -> None:
    assert computed(folder, "search.warm_starts=['oss']").costs.keys() == {"teacher", "oss"}
    gits = computed(folder, "search.warm_starts=['gits']")
    assert gits.costs == {"teacher": 200, "gits": 0}
    assert gits.candidates["gits"].timesteps[0] == 999


def test_each_other_setting_has_the_list_too(folder: Path) -> None:
    found = computed(folder, "sampling.solver=['ddim', 'dpmpp_2m']", "sampling.final=['zero', 'sigma_min']").candidates
    assert list(found) == ["oss", "oss, final sigma_min", "oss, solver dpmpp_2m", "gits"]
    assert len({found[name].timesteps for name in list(found)[:3]}) == 1
    assert found["oss, solver dpmpp_2m"].settings_dict == {"final": "zero", "solver": "dpmpp_2m"}
    assert found["oss"].settings_dict == {"final": "zero", "solver": "ddim"}


def test_a_solver_with_fewer_steps_for_its_budget_has_a_list_of_them(folder: Path) -> None:
    settings = ["sampling.solver=['ddim', 'heun']", "sampling.steps={min=2, max=6}", "search.max_cost=1.0"]
    found = computed(folder, *settings).candidates
    assert (found["oss"].steps, found["oss, solver heun"].steps) == (6, 3)
    assert found["oss"].timesteps == computed(folder, "sampling.steps=6").candidates["oss"].timesteps
    assert found["oss, solver heun"].timesteps == computed(folder, "sampling.steps=3").candidates["oss"].timesteps


def test_lists_keep_the_gap_and_many_steps_have_a_finer_grid(folder: Path) -> None:
    apart = computed(folder, "sampling.steps=10", "sampling.min_gap=90").candidates
    assert all(a - b >= 90 for candidate in apart.values() for a, b in pairwise(candidate.timesteps))
    plan = plan_starts(built(folder, "sampling.steps=40"))
    assert plan is not None
    assert plan.points == 80


def test_large_images_have_a_smaller_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "NUMBERS", 25 * 16 * 5)
    plan = plan_starts(built(folder))
    assert plan is not None
    assert plan.images == 5


def test_images_that_are_not_finite_leave_them_out_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = built(folder, "model.check=false")
    model = replace(parts.model, denoiser=lambda x, t, skip: torch.full_like(x, torch.nan))
    broken = replace(parts, evaluator=replace(parts.evaluator, model=model))
    study = lifecycle.open_study(broken, open_storage(URL))
    assert "oss" not in study.user_attrs[BASELINE_KEYS]
    assert study.trials[0].user_attrs[BASELINE] == "uniform"
    assert "not finite" in caplog.text


def test_a_screens_teacher_that_is_not_finite_leaves_no_screen_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = built(folder, "model.check=false", "search.trials=2", "search.warm_starts=['uniform']", *SCREENED)
    denoiser, calls = parts.model.denoiser, list[float]()

    def overflowing(x: torch.Tensor, t: float, skip: int) -> torch.Tensor:
        calls.append(t)
        return denoiser(x, t, skip) * (torch.nan if len(calls) == 16 else 1.0)

    model = replace(parts.model, denoiser=overflowing)
    broken = replace(parts, evaluator=replace(parts.evaluator, model=model))
    database = open_storage(URL)
    study = lifecycle.open_study(broken, database)
    loop.work(broken, study, database)
    assert "a run of 16 steps gives images that are not finite; the search goes without the screen" in caplog.text
    assert [(t.state, sorted(t.intermediate_values)) for t in study.trials] == [(TrialState.COMPLETE, [32, 64])] * 2


def test_of_workers_that_start_together_one_computes_them(folder: Path, teachers: list[int]) -> None:
    parts = [built(folder) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        keys = list(
            threads.map(lambda part: lifecycle.open_study(part, open_storage(URL)).user_attrs[BASELINE_KEYS], parts)
        )
    assert keys[0] == keys[1] == keys[2]
    assert len(teachers) == 1
