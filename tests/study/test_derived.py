"""Results with timesteps that no search found keep the winner's settings, skip no layer, and say what they are."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from example_results import ours
from tiny_models import write_ddpm

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.export.formats import result_of, result_text
from autodiffusion_optuna.results.summary import StudySummary, read_summary
from autodiffusion_optuna.search.timesteps import resample
from autodiffusion_optuna.study import components, given
from autodiffusion_optuna.study.derived import derived_result
from studies import run

URL = "sqlite:///adopt.db"


@pytest.fixture
def masked(folder: Path) -> StudySummary:
    """A study of a small real model whose budget makes it skip layers, and whose solver is searched."""
    write_ddpm(folder / "net", sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    settings = ["name=mine", "model.source=net", "score.reference=images.npz", "search.trials=9", "score.images=16"]
    settings += ["search.max_skip=0.6", "search.max_cost=0.9", "sampling.solver=['heun', 'dpmpp']", "sampling.order=2"]
    return read_summary(run(folder / "quick.toml", URL, *settings))


def test_layers_are_skipped_at_no_other_timesteps(folder: Path, masked: StudySummary) -> None:
    own = result_of(masked)
    assert own.masked
    result, notes = derived_result(masked, steps=7)
    assert result.timesteps == resample(masked.noise, own.timesteps, 7)
    assert (result.skips, result.score) == (((),) * 7, None)
    assert (result.solver, result.final, result.guidance) == (own.solver, own.final, own.guidance)
    visits = {"heun": 2 * 7 - 1}.get(own.solver, 7)
    assert result.cost == pytest.approx(visits / (2 * 3 - 1))  # of the first solver, Heun, at three steps
    assert "all run here" in notes[-1]
    script = result_text(result, "diffusers")
    assert (
        f"Study mine-7-steps: {own.solver}, 7 steps: timesteps, interpolated from 3 found steps, not searched."
        in script
    )
    result.write("mine-7-steps.json")
    (folder / "mine.py").write_text(script)
    assert int((runpy.run_path("mine.py")["images"].int() - ours(result, 16).int()).abs().max()) <= 2
    assert derived_result(masked, steps=3) == (own, [])


def test_lists_beside_the_winner_have_its_settings(masked: StudySummary) -> None:
    assert masked.best is not None
    built = components.build(masked.config)
    winner = Candidate(masked.best.candidate.timesteps, settings=(("solver", "dpmpp_2m"),))
    found, notes = given.beside_winner(["a=900 500", "timesteps: 999.0, 250.75"], built, winner)
    assert found == {
        "a": Candidate((900, 500), settings=(("solver", "dpmpp_2m"),)),
        "list 2": Candidate((999, 251), settings=(("solver", "dpmpp_2m"),)),
    }
    assert notes == ["list 2: timesteps rounded to the model's: 250.75 to 251"]
