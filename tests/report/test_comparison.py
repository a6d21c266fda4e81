"""What was found against what it is compared with: one size of images, floors, and what each change earned."""

from __future__ import annotations

from dataclasses import replace

import pytest
from long_study import long_summary

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.report.comparison import ablation, broken, compared_rows, values
from autodiffusion_optuna.results.ablation import undo_each
from autodiffusion_optuna.results.floors import many_steps
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.results.summary import StudySummary
from autodiffusion_optuna.storage.attrs import CODEC, MANY_STEPS, REAL_FLOOR, held_out_key

CODED = {"T": 1000, "min_gap": 1, "choices": {}, "ranges": {}}
FOUND, UNIFORM, COSINE, MANY = (
    HeldOut(500, values) for values in ((9.0, 10.0, 11.0), (19.0, 20.0, 22.0), (14.0, 15.0, 16.0), (5.0, 5.5, 6.0))
)


def scored(real: float | None = 3.0) -> StudySummary:
    """A study whose best, baselines and floors have held-out values."""
    summary = long_summary(60, units=0)
    best = summary.best
    assert best is not None
    floor = many_steps(1000, 100, best.candidate)
    assert floor is not None
    attrs = {
        **summary.attrs,
        CODEC: CODED,
        MANY_STEPS: {"candidate": floor.key, "cost": 10.0},
        held_out_key(floor.key, *MANY.size): MANY.to_json(),
        REAL_FLOOR: {"value": real, "images": 500, "against": 4500, "note": "images of the reference"},
    }
    held_out = {"uniform": UNIFORM, "cosine": COSINE}
    baselines = [replace(row, held_out=held_out[row.name]) for row in summary.baselines]
    return replace(summary, best=replace(best, held_out=FOUND), baselines=baselines, attrs=attrs)


def test_the_best_is_above_and_the_floors_are_below() -> None:
    figure = values(scored())
    assert figure is not None
    assert figure.layout.yaxis.ticktext == (
        "<b>best found</b>",
        "cosine",
        "uniform",
        "uniform, 100 steps",
        "real images",
    )
    assert [trace.x[0] for trace in figure.data] == pytest.approx([10.0, 15.0, UNIFORM.mean, 5.5, 3.0], rel=1e-4)
    first = figure.data[0].error_x
    assert first.array[0] == first.arrayminus[0] == pytest.approx(FOUND.half_width, rel=1e-4)
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis.title.text == "FD(digits), log scale, lower is better"


def test_values_of_other_images_are_left_out() -> None:
    summary = scored()
    other = [
        replace(row, held_out=HeldOut(100, (1.0, 2.0))) if row.name == "cosine" else row for row in summary.baselines
    ]
    assert [row.name for row in compared_rows(replace(summary, baselines=other))] == [
        "best found", "uniform", "uniform, 100 steps",
    ]  # fmt: skip
    figure = values(replace(summary, attrs={**summary.attrs, REAL_FLOOR: {**summary.attrs[REAL_FLOOR], "images": 100}}))
    assert figure is not None
    assert "real images" not in figure.layout.yaxis.ticktext


def test_values_below_zero_have_a_linear_axis() -> None:
    summary = scored(real=None)
    assert summary.best is not None
    figure = values(replace(summary, best=replace(summary.best, held_out=HeldOut(500, (-0.1, 0.0, -0.2)))))
    assert figure is not None
    assert figure.layout.xaxis.type is None
    assert figure.layout.xaxis.title.text == "FD(digits), lower is better"


def test_without_held_out_values_there_is_nothing_to_draw() -> None:
    assert values(long_summary(60)) is None
    assert ablation(scored()) is None


def test_a_change_that_may_be_chance_is_pale() -> None:
    summary = scored()
    assert summary.best is not None
    best = summary.best.candidate
    clear, chance = undo_each(best, CODED)[:2]
    attrs = {
        **summary.attrs,
        held_out_key(best.key, 500, 3): FOUND.to_json(),
        held_out_key(clear.candidate.key, 500, 3): HeldOut(500, (19.0, 20.0, 21.0)).to_json(),
        held_out_key(chance.candidate.key, 500, 3): HeldOut(500, (8.0, 12.0, 11.0)).to_json(),
    }
    figure = ablation(replace(summary, attrs=attrs))
    assert figure is not None
    (bars,) = figure.data
    assert bars.x == (10.0, pytest.approx(1 / 3, rel=1e-3))
    assert bars.marker.color[0] != bars.marker.color[1]
    assert [name for name, _ in bars.customdata] == [clear.name, chance.name]
    assert all(len(line) <= 20 for label in figure.layout.yaxis.ticktext for line in label.split("<br>"))


def test_a_long_name_is_broken_between_words() -> None:
    assert broken("uniform") == "uniform"
    assert broken("uniform, solver dpmpp_2m") == "uniform, solver<br>dpmpp_2m"
    assert broken(Candidate((9, 5)).key) == "9,5"
