"""A search through the command line on a tiny real model of every kind: six candidates, layers included."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_adm
import tiny_models
import tiny_pipelines
from command import Adopt

Write = Callable[[Path], list[str]]


def folder_of(write: Callable[[Path], object]) -> Write:
    def settings(folder: Path) -> list[str]:
        write(folder / "model")
        return ["model.source=model"]

    return settings


def prompted(write: Callable[[Path], object], *more: str) -> Write:
    def settings(folder: Path) -> list[str]:
        write(folder / "model")
        prompts = tiny_pipelines.write_prompts(folder)
        return ["model.source=model", f"model.prompts={prompts}", *more]

    return settings


def adm(folder: Path) -> list[str]:
    unet, classifier, fields = tiny_adm.write_adm(folder)
    given = [f"model.fields.{name}={json.dumps(value)}" for name, value in fields.items()]
    return [f"model.source=adm:{unet}", f"model.classifier={classifier}", "sampling.guidance=[1.0, 2.0]", *given]


KINDS: dict[str, Write] = {
    "ddpm": folder_of(tiny_models.write_ddpm),
    "class-conditional": folder_of(tiny_models.write_class_conditional),
    "dit": folder_of(tiny_models.write_dit),
    "sd": prompted(tiny_pipelines.write_sd),
    "sdxl": prompted(tiny_pipelines.write_sdxl),
    "sd3": prompted(tiny_pipelines.write_sd3),
    "flux": prompted(tiny_pipelines.write_flux, "model.size=[16, 16]"),
    "adm": adm,
}

STUDY = """
[model]
source = "model"
device = "cpu"
batch = 4

[sampling]
solver = ["ddim", "dpmpp_2m"]
steps = 3

[search]
trials = 6
population = 2
parents = 2
stage_one_generations = 1
max_skip = 0.5
modes = ["skip", "reuse"]
warm_starts = ["uniform"]

[score]
extractor = "pixels"
reference = "reference.npz"
images = 8
finalists = 0
floor_steps = 0
held_out_images = 8
held_out_banks = 2
"""


def image_shape(folder: Path, adopt: Adopt, arguments: list[str]) -> tuple[int, ...]:
    """Shape of the model's images, as the command line tells it of a reference of another size."""
    from autodiffusion_optuna.config import load_config
    from autodiffusion_optuna.evaluation.models import load_model

    shape: tuple[int, ...] = load_model(load_config(folder / "any.toml", arguments).model).picture_shape
    return shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_end_to_end(folder: Path, adopt: Adopt, kind: str) -> None:
    settings = KINDS[kind](folder)
    (folder / "any.toml").write_text(STUDY)
    channels, height, width = image_shape(folder, adopt, settings)
    rng = np.random.default_rng(0)
    np.savez(folder / "reference.npz", arr_0=rng.integers(0, 256, (40, height, width, channels), dtype=np.uint8))
    arguments = [argument for setting in settings for argument in ("--set", setting)]

    result = adopt("run", "--study", "any.toml", *arguments)
    assert result.code == 0, result.err
    assert re.search(r"warning: model '\w+' (denoises no better|misjudges its noise)", result.err)  # never trained
    assert "warning: reference 'reference' has 40 images for" in result.err
    shown: dict[str, Any] = json.loads(adopt("show", "--study", "any", "--json").out)
    assert (shown["finished"], shown["stage"]) == (6, 2)
    assert set(shown["best"]["settings"]) >= {"solver"}
    assert np.isfinite(shown["best"]["held_out"]["mean"])

    assert adopt("run", "--study", "any", "--set", "search.trials=7").code == 0  # the database knows the rest
    assert adopt("export", "--study", "any", "--format", "json", "--out", ".").code == 0
    assert json.loads((folder / "any.json").read_text())["model"]["kind"]
    script = adopt("export", "--study", "any")
    # DiTPipeline takes class 1000 for none, whatever the network's number of classes; this one has ten.
    assert (script.code, "own sampler instead" in script.err) == (0, kind == "dit"), script.err
    assert "not checked" not in script.err
    assert ("from diffusers import" in script.out) == (kind not in ("adm", "dit"))
    scored = adopt("score", "--result", "any.json", "--images", "6", "--banks", "2")
    assert scored.code == 0, scored.err
    assert "uniform" in scored.out
    assert "found on" not in scored.err
    assert adopt("sample", "--result", "any.json", "--images", "3", "--out", "grid.png").code == 0
    assert (folder / "grid.png").stat().st_size > 0
    quiet = adopt("sample", "--result", "any.json", "--set", "model.check=false", "--out", "grid.png")
    assert "denoises no better" not in quiet.err
    assert "misjudges its noise" not in quiet.err
