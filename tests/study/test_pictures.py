"""Pictures of what was found beside what it is compared with: their rows, their captions, and the study's own one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import optuna
import pytest
from command import Adopt, check_refused
from PIL import Image

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.cli.output import load_components
from autodiffusion_optuna.images import CELL, draw_grid, grid_png
from autodiffusion_optuna.results.captions import caption
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.artifacts import COMPARISON, comparison_of, keep_comparison, open_store
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.manage import copy_study
from autodiffusion_optuna.storage.study_storage import id_of_study
from autodiffusion_optuna.study import pictures

URL = "sqlite:///adopt.db"


def test_a_caption_names_steps_solver_and_other_settings() -> None:
    plain = Candidate((900, 500))
    assert caption("uniform", plain, "ddim") == "uniform\n2 steps, ddim"
    chosen = Candidate((900,), settings=(("guidance", 1.5), ("solver", "heun")))
    assert caption("best found", chosen, "ddim, heun", "FID 3.2, held-out") == (
        "best found\n1 step, heun\nguidance 1.5\nFID 3.2, held-out"
    )


@pytest.mark.parametrize(
    ("side", "channels", "drawn"), [(4, 1, 96), (28, 1, 84), (32, 3, 96), (64, 3, 128), (256, 3, 192), (512, 1, 192)]
)
def test_small_images_are_enlarged_by_a_whole_factor(folder: Path, side: int, channels: int, drawn: int) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (f"{name}\n6 steps, ddim", rng.integers(0, 256, (3, channels, side, side), dtype=np.uint8)) for name in "ab"
    ]
    draw_grid(rows, folder / "grid.png")
    with Image.open(folder / "grid.png") as found:
        picture = np.asarray(found.convert("RGB"))
    right, bottom = picture.shape[1] - 16, picture.shape[0] - 16
    last = picture[bottom - drawn : bottom, right - drawn : right]
    assert (last[:, -1] != 255).any()  # the image ends here
    assert (picture[bottom:] == 255).all()
    if side <= CELL:  # every pixel is a square
        factor = drawn // side
        given = np.repeat(np.moveaxis(rows[1][1][2], 0, -1), 3 // channels, axis=-1)
        assert np.array_equal(last[::factor, ::factor], given)
    captions = picture[16:bottom, 16:90]
    assert (captions < 128).any()


def test_the_rows_are_those_of_the_headline(quick: optuna.Study) -> None:
    parts = load_components("quick", URL, False)[1]
    summary = read_summary(quick)
    headline = summary.headline
    assert headline is not None
    rows = pictures.rows_of(parts, summary)
    assert [candidate.key for _, candidate in rows[:2]] == [
        headline.baseline.candidate.key,
        headline.found.candidate.key,
    ]
    assert rows[1][0] == f"best found\n3 steps, ddim\nFD(pixels) {significant(headline.found_value)}, held-out"
    assert rows[2][0].startswith("many steps\n100 steps, ddim\nFD(pixels) ")
    assert rows[2][1].steps == 100
    assert pictures.rows_of(parts, summary, 20)[2][0] == "many steps\n20 steps, ddim"


def test_a_run_keeps_the_comparison_among_the_studys_artifacts(quick: optuna.Study, folder: Path) -> None:
    storage, parts = open_storage(URL), load_components("quick", URL, False)[1]
    of_run = comparison_of(quick, storage)
    assert of_run["filename"] == COMPARISON
    assert "best found" in of_run["content"]
    store = open_store(str(folder / "pictures"))
    keep_comparison(quick, storage, store, b"another", "other candidates")
    (path,) = (folder / "pictures").iterdir()
    assert path.read_bytes() == b"another"
    pictures.keep(parts, quick, storage, None)  # no store, nothing kept
    assert comparison_of(quick, storage)["content"] == "other candidates"
    pictures.keep(parts, quick, storage, store)
    assert comparison_of(quick, storage)["content"] == of_run["content"]
    rows = pictures.samples(parts, pictures.rows_of(parts, read_summary(quick)), pictures.ARTIFACT_IMAGES)
    (path,) = (folder / "pictures").iterdir()
    assert path.read_bytes() == grid_png(rows)
    before = path.stat().st_mtime_ns
    pictures.keep(parts, quick, storage, store)
    assert path.stat().st_mtime_ns == before  # nothing has changed


def test_what_the_dashboard_removed_is_neither_shown_nor_copied(quick: optuna.Study, folder: Path) -> None:
    storage, store = open_storage(URL), open_store(str(folder / "pictures"))
    keep_comparison(quick, storage, store, b"a picture", "these")
    removed = comparison_of(quick, storage)["artifact_id"]
    storage.set_study_system_attr(id_of_study(quick), f"artifacts:{removed}", json.dumps(None))
    assert comparison_of(quick, storage) == {}
    copy_study(storage, "quick", "copy")
    assert comparison_of(optuna.load_study(study_name="copy", storage=storage), storage) == {}


def test_the_sample_command_draws_three_captioned_rows(quick: optuna.Study, folder: Path, adopt: Adopt) -> None:
    result = adopt("sample", "--study", "quick", "--out", "grid.png", "--images", "5")
    assert (result.code, result.out) == (0, "wrote grid.png\n"), result
    parts = load_components("quick", URL, False)[1]
    rows = pictures.samples(parts, pictures.rows_of(parts, read_summary(quick)), 5)
    with Image.open(folder / "grid.png") as found, Image.open(io.BytesIO(grid_png(rows))) as expected:
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    check_refused(
        adopt("sample", "--study", "quick", "--out", "a.png", "--many-steps", "1001"), "--many-steps 1001", "1000"
    )
