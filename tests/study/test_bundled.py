"""The bundled models: what they are, and that a short search on them already beats every baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from diffusers import DDIMPipeline
from load_source import load_source

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.features.bundled import FACES_ATTRIBUTES
from autodiffusion_optuna.evaluation.frechet import frechet_distance
from autodiffusion_optuna.evaluation.models import ASSETS
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.search.timesteps import BASELINES
from autodiffusion_optuna.storage.attrs import CANDIDATE, COST, STAGE, UNIT_COSTS
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.study import components, lifecycle, loop

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
SHAPES = {"digits": (1, 28, 28), "faces": (3, 32, 32)}


@pytest.mark.parametrize("name", SHAPES)
def test_they_are_small_and_have_enough_units(name: str) -> None:
    model = load_source(name, clip=False)
    assert model.shape == SHAPES[name]
    assert len(model.units) >= 12
    weights = [ASSETS / name / "unet" / "diffusion_pytorch_model.safetensors", ASSETS / name / "extractor.safetensors"]
    assert sum(file.stat().st_size for file in weights) <= 6e6


@pytest.mark.parametrize("name", SHAPES)
def test_they_are_plain_diffusers_pipelines(name: str) -> None:
    pipeline = DDIMPipeline.from_pretrained(ASSETS / name, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images
    channels, height, width = SHAPES[name]
    assert images.shape == (2, height, width, channels)


@pytest.mark.parametrize("name", SHAPES)
def test_their_cards_state_what_was_measured(name: str) -> None:
    card = (ASSETS / name / "README.md").read_text()
    training = json.loads((ASSETS / name / "training.json").read_text())
    measured = json.loads((RESULTS / f"model_card_{name}.json").read_text())["result"]
    assert f"{training['model']['parameters']:,} parameters" in card
    accuracy = training["extractor"]["accuracy"]
    for what, share in accuracy.items() if isinstance(accuracy, dict) else ():
        assert f"| {what} | {share:.1%} |" in card
    assert {"4", "6", "10", "20", "100"} <= measured["frechet"].keys()
    for steps, value in measured["frechet"].items():
        assert f"| {steps} | {value:.2f} |" in card


def test_the_faces_name_where_their_data_comes_from() -> None:
    card = (ASSETS / "faces" / "README.md").read_text()
    assert all(words in card for words in ("Micah Lanier", "CC BY 4.0", "Avatar Illustration System"))


def test_the_faces_extractor_tells_attributes_of_faces_it_never_saw() -> None:
    accuracy = json.loads((ASSETS / "faces" / "training.json").read_text())["extractor"]["accuracy"]
    assert accuracy.keys() == FACES_ATTRIBUTES.keys()
    assert min(accuracy.values()) > 0.8


def test_real_faces_are_nearer_than_sampled_ones_and_many_steps_nearer_than_few() -> None:
    with np.load(Path(__file__).parent.parent / "data" / "faces_heldout.npz") as data:
        held_out = torch.from_numpy(data["x"]).permute(0, 3, 1, 2)
    parts = components.build(load_preset("faces-4", ["model.device=cpu", "score.images=64"]))
    real = frechet_distance(parts.evaluator.extractor(held_out[:64]), parts.evaluator.reference)
    few = parts.evaluator.score(parts.baselines["uniform"], [64]).value
    many = parts.evaluator.score(Candidate(BASELINES["uniform"](parts.model.schedule, 20)), [64]).value
    assert real < many < few


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
    settings = ["search.trials=28", "search.stage_one_generations=2", "score.images=16"]
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
    assert len(first["skip"]) == len(first["reuse"]) == len(load_source("digits", clip=False).units)
    assert max(first["skip"]) > 0
    assert all(reuse <= skip for skip, reuse in zip(first["skip"], first["reuse"], strict=True))
    again = components.build(load_preset("digits-10-layers", settings), unit_costs=first)
    assert list(again.space.unit_costs) == first["skip"]
