"""Figures show what the study holds, and stay small however long it is."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
from long_study import POPULATION, long_summary
from optuna.trial import TrialState

from autodiffusion_optuna import noise
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.report.figures import FIGURES, evaluations, history, masks, timesteps
from autodiffusion_optuna.results.summary import StudySummary
from autodiffusion_optuna.storage.attrs import OPERATOR

LARGEST = 60_000


@pytest.fixture(scope="module")
def short() -> StudySummary:
    return long_summary(60, units=14)


def named(figure: Any, name: str) -> Any:
    (trace,) = [trace for trace in figure.data if trace.name == name]
    return trace


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_five_thousand_trials_is_small(name: str) -> None:
    figure = FIGURES[name][1](long_summary(5000))
    assert figure is not None
    size = len(figure.to_json())
    print(f"{name}: {size} bytes of JSON at 5,000 trials")
    assert 1000 < size < LARGEST


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("trials", [0, 1, 2])
def test_a_study_that_has_hardly_begun(name: str, trials: int) -> None:
    figure = FIGURES[name][1](long_summary(trials))
    assert (figure is None) == (trials == 0)


def test_timesteps_lie_at_their_log_snr_below_uniforms(short: StudySummary) -> None:
    figure = timesteps(short)
    schedule = noise.linear(1000)
    uniform = named(figure, "uniform")
    expected = [2 * schedule.lambda_(t) for t in range(900, -1, -100)]
    assert uniform.x == pytest.approx(expected, abs=1e-3)
    assert set(uniform.y) == {0}
    assert short.best is not None
    last = figure.data[-2]  # drawn before uniform
    assert tuple(last.customdata) == short.best.candidate.timesteps
    assert last.x == pytest.approx([2 * schedule.lambda_(t) for t in short.best.candidate.timesteps], abs=1e-3)
    assert list(last.x) == sorted(last.x)  # from noise to image
    colours = [trace.marker.color for trace in figure.data[:-1]]
    assert len(set(colours)) == len(colours) == 3
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # uniform above


def test_masks_show_each_step_and_unit(short: StudySummary) -> None:
    assert short.best is not None
    candidate = short.best.candidate
    figure = masks(short)
    (cells,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert cells.x == short.units
    assert cells.y == tuple(f"t = {t}" for t in candidate.timesteps)
    found = [[short.units[u] for u, skipped in enumerate(line) if skipped] for line in cells.z]
    assert found == candidate.skip_names(short.units)
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
    run, saved = named(figure, "run"), named(figure, "saved by the prefix cache")
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
