"""The number of images beside every value, and the warnings of a run in every view."""

from __future__ import annotations

import io
import json
from pathlib import Path

import optuna
import pytest
from command import Adopt
from rich.console import Console

from autodiffusion_optuna.cli import run, tables
from autodiffusion_optuna.report.dashboard import note_text
from autodiffusion_optuna.report.page import page
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import BASELINE_KEYS, CANDIDATE, held_out_key
from autodiffusion_optuna.study import components, lifecycle, loop

URL = "sqlite:///adopt.db"


@pytest.fixture
def doubtful(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished study that ``run`` warned of."""
    monkeypatch.setattr(lifecycle, "warnings", lambda parts, images: [f"a doubt about {images} images"])
    ran = adopt("run", "--study", "quick.toml", "--set", "search.trials=8")
    assert "warning: a doubt about 64 images" in ran.err


@pytest.mark.parametrize("command", ["show", "status", "score", "run", "export"])
def test_each_command_repeats_what_run_warned_of(doubtful: None, adopt: Adopt, command: str) -> None:
    more = ["--format", "json"] if command == "export" else []
    shown = adopt(command, "--study", "quick", *more)
    assert shown.code == 0
    assert shown.err.count("a doubt about 64 images") == 1
    assert "a doubt" not in shown.out


@pytest.mark.parametrize("command", ["show", "status"])
def test_json_holds_the_warnings(doubtful: None, adopt: Adopt, command: str) -> None:
    shown = adopt(command, "--study", "quick", "--json")
    assert "a doubt about 64 images" in json.loads(shown.out)["warnings"]


def test_the_page_and_the_dashboard_hold_the_warnings(doubtful: None, adopt: Adopt) -> None:
    summary = read_summary(optuna.load_study(study_name="quick", storage=URL))
    assert "- a doubt about 64 images" in note_text(summary, URL)
    assert adopt("report", "--study", "quick", "--out", "x.html", "--no-pictures").code == 0
    assert "a doubt about 64 images" in Path("x.html").read_text()


def test_warnings_are_those_of_the_last_run(doubtful: None, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "warnings", lambda parts, images: [])
    assert adopt("run", "--study", "quick", "--set", "search.trials=9").code == 0
    assert "a doubt" not in adopt("show", "--study", "quick").err


def test_what_a_check_found_stays_where_it_is_turned_off(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "check_model", lambda *given: ["it denoises nothing"])
    assert "it denoises nothing" in adopt("run", "--study", "quick.toml", "--set", "search.trials=8").err
    assert adopt("run", "--study", "quick", "--set", "search.trials=9", "--set", "model.check=false").code == 0
    assert adopt("show", "--study", "quick").err.count("it denoises nothing") == 1


def test_several_workers_are_warned_of_at_the_start(folder: Path, adopt: Adopt) -> None:
    few = ["--set", "search.trials=8", "--set", "score.images=4", "--set", "score.held_out_images=6"]
    result = adopt("run", "--study", "quick.toml", "--workers", "2", *few)
    assert result.code == 0, result
    assert result.err.count("warning: 4 images for") == 1
    assert result.err.count("warning: 6 images for") == 1
    assert "computed otherwise" not in result.err


def test_too_few_images_on_held_out_noise_are_said(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=8").code == 0
    assert "2 images for" not in adopt("show", "--study", "quick").err
    scored = adopt("score", "--study", "quick", "--images", "2")
    assert [line for line in scored.err.splitlines() if "warning: 2 images for" in line]


def test_every_view_says_how_many_images_a_value_is_of(quick: optuna.Study, adopt: Adopt) -> None:
    said, _, _, head, *_ = adopt("show", "--study", "quick").out.splitlines()
    assert "on 3 x 64 held-out images" in said
    assert "3 x 64 images" in head
    assert "        64 images" in head
    assert "(FD(pixels), 64 images)" in adopt("show", "--study", "quick").out
    assert "of 64 images" in adopt("status", "--study", "quick").out
    assert "(FD(pixels), 64 images, search noise)" in adopt("studies").out
    status = json.loads(adopt("status", "--study", "quick", "--json").out)
    assert (status["images"], status["bank"]) == (64, 0)
    summary = read_summary(quick)
    assert "FD(pixels), 64 images" in note_text(summary, URL)
    assert "3 x 64 images" in note_text(summary, URL)
    text = page(summary)
    assert "search&rsquo;s noise<br>64 images" in text
    assert "3&nbsp;&times;&nbsp;64 images" in text
    assert "FD(pixels), lower is better" in text


def test_progress_says_how_many_images_the_best_is_of(folder: Path, adopt: Adopt) -> None:
    ran = adopt("run", "--study", "quick.toml", "--set", "search.trials=8")
    lines = [line for line in ran.out.splitlines() if line.startswith("candidates ")]
    assert lines
    assert all("of 64 images" in line for line in lines)


def better(found: optuna.Study) -> None:
    """Another winner, which was scored on nothing yet."""
    best = read_summary(found).best
    assert best is not None
    trial = found.trials[best.trial]
    key = trial.user_attrs[CANDIDATE]
    baselines = found.user_attrs[BASELINE_KEYS].values()
    other = next(t for t in found.trials if t.user_attrs[CANDIDATE] not in {key, *baselines})
    attrs = {**trial.user_attrs, CANDIDATE: other.user_attrs[CANDIDATE]}
    found.add_trial(
        optuna.create_trial(
            params=other.params, distributions=other.distributions, value=best.value - 1.0, user_attrs=attrs
        )
    )


def test_the_most_images_win_and_smaller_counts_stand_beside_their_values(quick: optuna.Study, adopt: Adopt) -> None:
    assert adopt("score", "--study", "quick", "--images", "96").code == 0
    better(quick)
    summary = read_summary(quick)
    assert summary.held_out_size == (96, 3)
    assert summary.best is not None
    key = summary.best.candidate.key
    quick.set_user_attr(held_out_key(key, 64, 3), HeldOut(64, (1.0, 2.0, 3.0)).to_json())
    shown = adopt("show", "--study", "quick")
    assert "3 x 96 images" in shown.out.splitlines()[3]
    assert "2 ± 2.5 (3 x 64)" in shown.out
    assert "score it too: adopt score --study quick --images 96 --banks 3" in shown.err
    for text in (note_text(read_summary(quick), URL), page(read_summary(quick)).replace("&nbsp;&times;&nbsp;", " x ")):
        assert "3 x 96 images" in text
        assert "(3 x 64)" in text


def test_only_values_of_equal_counts_are_compared(quick: optuna.Study, adopt: Adopt) -> None:
    uniform = next(row for row in read_summary(quick).baselines if row.name == "uniform")
    values = HeldOut(5000, (1e-6, 2e-6))
    quick.set_user_attr(held_out_key(uniform.candidate.key, 5000, 2), values.to_json())
    summary = read_summary(quick)
    headline = summary.headline
    assert headline is not None
    assert [row.held_out and row.held_out.size for row in (headline.found, headline.baseline)] == [(64, 3), (64, 3)]
    assert headline.difference is not None
    assert headline.difference.size == (64, 3)
    assert summary.difference(headline.found) is None  # the table's two values are of unequal counts
    assert "2 x 5,000" in adopt("show", "--study", "quick").out
    assert "images from noise that the search never saw" in page(summary)
    assert "paired over 3&nbsp;&times;&nbsp;64 images" in page(summary)


def test_names_are_whole_in_a_narrow_terminal(quick: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Console(width=80, record=True, highlight=False, markup=False)
    monkeypatch.setattr(tables, "out", narrow)
    tables.print_table(read_summary(quick))
    text = narrow.export_text()
    assert "…" not in text
    for baseline in read_summary(quick).baselines:
        assert baseline.name in text


def test_a_run_that_has_found_nothing_yet_says_so(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(run, "out", Console(force_terminal=True, file=screen, width=100))
    monkeypatch.setattr(loop, "work", lambda *_: None)
    adopt("run", "--study", "quick.toml")
    board = screen.getvalue()
    assert "0 of 24" in board
    assert "none yet" in board
