"""Figures show what the study holds, and stay small however long it is."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from long_study import POPULATION, long_summary
from optuna.trial import TrialState

from autodiffusion_optuna import noise
from autodiffusion_optuna.candidate import SKIP, Candidate
from autodiffusion_optuna.report.figures import FIGURES, evaluations, history, masks, timesteps
from autodiffusion_optuna.report.style import log_axis
from autodiffusion_optuna.results.summary import StudySummary
from autodiffusion_optuna.storage.attrs import OPERATOR

LARGEST = 60_000
OF_TRIALS = ("timesteps", "masks", "history", "evaluations")
"""Figures of the search; those of held-out values are in ``test_comparison.py``."""


@pytest.fixture(scope="module")
def short() -> StudySummary:
    return long_summary(60, units=14)


def named(figure: Any, name: str) -> Any:
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


@pytest.mark.parametrize("name", OF_TRIALS)
def test_a_figure_of_five_thousand_trials_is_small(name: str) -> None:
    figure = FIGURES[name][1](long_summary(5000))
    assert figure is not None
    size = len(figure.to_json())
    print(f"{name}: {size} bytes of JSON at 5,000 trials")
    assert 1000 < size < LARGEST


@pytest.mark.parametrize("name", OF_TRIALS)
@pytest.mark.parametrize("trials", [0, 1, 2])
def test_a_study_that_has_hardly_begun(name: str, trials: int) -> None:
    figure = FIGURES[name][1](long_summary(trials))
    assert (figure is None) == (trials == 0)


def test_timesteps_lie_below_uniforms(short: StudySummary) -> None:
    figure = timesteps(short)
    schedule = noise.linear(1000)
    uniform = named(figure, "uniform")
    assert list(uniform.x) == list(range(900, -1, -100))
    assert uniform.customdata == pytest.approx([2 * schedule.lambda_(t) for t in uniform.x], abs=1e-3)
    assert set(uniform.y) == {0}
    assert short.best is not None
    last = figure.data[-2]  # drawn before uniform
    assert tuple(last.x) == short.best.candidate.timesteps
    assert last.customdata == pytest.approx([2 * schedule.lambda_(t) for t in last.x], abs=1e-3)
    colours = [trace.marker.color for trace in figure.data[:-1]]
    assert len(set(colours)) == len(colours) == 3
    assert figure.layout.xaxis.range[0] > figure.layout.xaxis.range[1]  # from noise to image
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # uniform above


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (8.0, 20.0, ["8", "10", "12", "14", "16", "18", "20"]),
        (434.0, 1100.0, ["500", "600", "700", "800", "900", "1,000", "1,100"]),
        (0.9, 1.05, ["0.9", "0.95", "1", "1.05"]),
        (0.012, 0.2, ["0.02", "0.03", "0.05", "0.07", "0.1", "0.2"]),
        (2.0, 900.0, ["2", "5", "10", "20", "50", "100", "200", "500"]),
        (1.0, 50_000.0, ["1", "10", "100", "1,000", "10,000"]),
    ],
)
def test_the_ticks_of_a_log_axis_are_written_out(low: float, high: float, ticks: list[str]) -> None:
    axis = log_axis(low, high)
    assert axis["ticktext"] == ticks
    assert axis["range"] == pytest.approx([math.log10(low), math.log10(high)])


def test_masks_show_each_step_and_unit(short: StudySummary) -> None:
    assert short.best is not None
    candidate = short.best.candidate
    figure = masks(short)
    (cells,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert cells.x == short.units
    assert cells.y == tuple(f"t = {t}" for t in candidate.timesteps)
    found = [[short.units[u] for u, skipped in enumerate(line) if skipped] for line in cells.z]
    assert found == candidate.unit_names(short.units, SKIP)
    assert figure.layout.xaxis.ticktext == ("down", "up")
    assert figure.layout.yaxis.autorange == "reversed"


def test_nothing_skipped_draws_no_masks(short: StudySummary) -> None:
    assert short.best is not None
    plain = replace(short.best, candidate=Candidate(short.best.candidate.timesteps))
    assert masks(replace(short, best=plain)) is None


def numbers(trace: Any) -> list[int]:
    """Numbers of the trials that a trace shows."""
    return [number for number, _ in trace.customdata]


def test_the_history_holds_every_complete_trial_in_its_generation(short: StudySummary) -> None:
    figure = history(short)
    complete = {t.number: t.values[0] for t in short.trials if t.state == TrialState.COMPLETE}
    drawn: dict[int, float] = {}
    for operator in ("random", "mutation", "crossover"):
        trace = named(figure, operator)
        drawn |= dict(zip(numbers(trace), trace.y, strict=True))
        assert all(short.trials[n].user_attrs[OPERATOR] == operator for n in numbers(trace))
        for x, (number, generation) in zip(trace.x, trace.customdata, strict=True):
            assert generation == number // POPULATION
            assert abs(x - generation) < 0.36
    assert drawn == pytest.approx(complete, rel=1e-4)
    assert figure.layout.title.text == "FD(digits), 256 images, by generation"
    assert (figure.layout.xaxis.range, figure.layout.xaxis.dtick) == ((-0.5, 2.5), 1)
    for name, value in (("uniform", 60.0), ("cosine", 55.0)):
        line = named(figure, name)
        assert (line.x, line.y) == ((-0.5, 2.5), (value, value))


def test_the_history_names_the_uniform_baseline_of_the_headline(short: StudySummary) -> None:
    """Where solvers are searched that is uniform with the winner's solver, not with the first one."""
    assert short.best is not None
    settings = (("solver", "heun"),)
    best = replace(short.best, candidate=replace(short.best.candidate, settings=settings))
    candidate = replace(short.baselines[0].candidate, settings=settings)
    own = replace(short.baselines[0], name="uniform, solver heun", candidate=candidate, value=58.0)
    figure = history(replace(short, best=best, baselines=[*short.baselines, own]))
    assert named(figure, own.name).line.dash == "dash"
    assert named(figure, own.name).showlegend
    assert named(figure, "uniform").line.dash != "dash"


def test_the_history_shows_each_generations_median_and_the_best_so_far(short: StudySummary) -> None:
    figure = history(short)
    median, best = named(figure, "median"), named(figure, "best so far")
    lowest = float("inf")
    for generation in range(3):
        values = [
            t.values[0] for t in short.trials if t.number // POPULATION == generation and t.state == TrialState.COMPLETE
        ]
        left, right, gap = median.x[3 * generation : 3 * generation + 3]
        assert (left + right) / 2 == generation
        assert gap is None
        assert median.y[3 * generation] == pytest.approx(statistics.median(values), rel=1e-4)
        lowest = min(lowest, *values)
        steps = [y for x, y in zip(best.x, best.y, strict=True) if x <= generation]
        assert steps[-1] == pytest.approx(lowest, rel=1e-4)
    assert short.best is not None
    assert list(best.customdata[-1]) == [short.best.trial, 2]
    assert best.x[-1] == 2.5


def test_new_bests_of_a_long_study_are_not_thinned_out() -> None:
    summary = long_summary(5000)
    figure = history(summary)
    assert summary.best is not None
    points = {n for trace in figure.data if trace.mode == "markers" for n in numbers(trace)}
    assert summary.best.trial in points
    assert len(points) < 1300
    assert named(figure, "best so far").y[-1] == pytest.approx(summary.best.value, rel=1e-4)
    assert figure.layout.xaxis.dtick == 50


def test_outliers_are_counted_and_not_drawn_to_scale(short: StudySummary) -> None:
    far = short.trials[3]
    far.values = [1e6]
    try:
        figure = history(short)
    finally:
        far.values = [60.0]
    assert figure.layout.yaxis.range[1] < 1e3
    assert any(note.text == "↑ 1 worse trial above" for note in figure.layout.annotations)


def test_evaluations_are_summed_by_generation(short: StudySummary) -> None:
    figure = evaluations(short)
    run, saved = named(figure, "run"), named(figure, "reused")
    assert run.x == saved.x == ("0", "1", "2")
    assert saved.y == (500 * POPULATION,) * 3
    assert sum(run.y) == short.total("run")


def test_many_generations_share_bars() -> None:
    summary = long_summary(5000)
    figure = evaluations(summary)
    run = named(figure, "run")
    assert len(run.x) <= 40
    assert run.x[0] == "0-6"
    assert sum(run.y) == summary.total("run")
