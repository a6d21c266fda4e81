"""The bundled model: what it is, and that a short search on it already beats every baseline."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import torch
from diffusers import DDIMPipeline
from load_source import load_source

from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.models import DIGITS
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import CANDIDATE, COST, STAGE, UNIT_COSTS
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.study import components, lifecycle, loop


def test_it_is_small_and_has_enough_units() -> None:
    model = load_source("digits", clip=False)
    assert model.shape == (1, 28, 28)
    assert len(model.units) >= 12
    assert (DIGITS / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size <= 6e6
    assert (DIGITS / "extractor.safetensors").stat().st_size <= 1e6


def test_it_is_a_plain_diffusers_pipeline() -> None:
    pipeline = DDIMPipeline.from_pretrained(DIGITS, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (2, 28, 28, 1)


def test_its_card_states_what_was_measured() -> None:
    card = (DIGITS / "README.md").read_text()
    training = json.loads((DIGITS / "training.json").read_text())
    assert f"{training['model']['parameters']:,} parameters" in card
    assert f"{training['extractor']['accuracy']:.2%}" in card
    for steps in (4, 6, 10, 20, 100):
        assert f"| {steps} |" in card


def short_search(folder: Path, name: str, *settings: str) -> optuna.Study:
    small = ["model.device=cpu", "model.batch=32", "score.images=32", "search.population=8", *settings]
    parts = components.build(load_preset(name, small))
    storage = open_storage(f"sqlite:///{folder}/a.db")
    opened = lifecycle.open_study(parts, storage)
    loop.work(parts, opened, storage)
    return opened


def test_a_short_search_beats_the_baselines(tmp_path: Path) -> None:
    report = read_summary(short_search(tmp_path, "digits-4", "search.trials=40"))
    assert report.best is not None
    assert report.best.value < 0.85 * min(baseline.value for baseline in report.baselines if baseline.value is not None)


def test_the_layer_search_goes_through_both_stages_within_its_cost(tmp_path: Path) -> None:
    settings = ["search.trials=28", "search.stage_one_generations=2"]
    found = short_search(tmp_path, "digits-10-layers", *settings)
    stages = [trial.user_attrs[STAGE] for trial in found.trials]
    skipping = [":" in trial.user_attrs[CANDIDATE] for trial in found.trials]
    assert stages == [1] * 16 + [2] * 12
    assert not any(skipping[:16])
    assert any(skipping[16:])
    assert all(trial.user_attrs[COST] <= 0.8 + 1e-9 for trial in found.trials)


def test_measured_latencies_are_kept_when_a_study_goes_on(tmp_path: Path) -> None:
    settings = ["search.cost=latency", "score.images=2", "model.batch=2"]
    first = short_search(tmp_path, "digits-10-layers", *settings, "search.trials=1").user_attrs[UNIT_COSTS]
    assert len(first) == len(load_source("digits", clip=False).units)
    assert max(first) > 0
    again = components.build(load_preset("digits-10-layers", settings), unit_costs=tuple(first))
    assert again.space.unit_costs == tuple(first)
