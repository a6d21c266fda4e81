"""A result on another model than its own: what differs is said, and nothing is where it is the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from command import Adopt
from example_results import example, open_model, result_for
from tiny_models import make_unet, write_ddpm
from tiny_pipelines import write_prompts, write_sd

from autodiffusion_optuna import apply, load_study
from autodiffusion_optuna.evaluation.denoiser import weights_of, weights_sample
from autodiffusion_optuna.export.check import same_weights
from autodiffusion_optuna.study.transfer import differences, open_images

# diffusers, in pytest.warns
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTED = {"prompts": "prompts.txt", "size": [32, 32]}


def scheduled(folder: Path, **change: Any) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def other_weights(folder: Path) -> None:
    unet = make_unet()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1.05)  # as a little training would
    unet.save_pretrained(folder / "unet")


def other_scale(folder: Path) -> None:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.13025}))


def larger(folder: Path) -> None:
    write_ddpm(folder, sample_size=32)


def deeper(folder: Path) -> None:
    write_ddpm(folder, layers_per_block=2)


CHANGED: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], str]] = {
    "weights": (write_ddpm, other_weights, "other weights"),
    "prediction": (
        write_ddpm,
        lambda f: scheduled(f, prediction_type="sample"),
        "prediction sample instead of epsilon",
    ),
    "noise": (write_ddpm, lambda f: scheduled(f, beta_end=0.01), "another noise schedule"),
    "scale": (write_sd, other_scale, "latent scale 0.13025 instead of 0.18215"),
    "size": (write_ddpm, larger, "shape 3x32x32 instead of 3x16x16, image shape 3x32x32 instead of 3x16x16"),
    "layers": (write_ddpm, deeper, "other layers (18 instead of 12)"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_other_is_named(folder: Path, name: str) -> None:
    write, change, message = CHANGED[name]
    write_prompts(folder)
    options = PROMPTED if write is write_sd else None
    for place in ("net", "other"):
        write(folder / place)
    change(folder / "other")
    result = result_for(Path("net"), options)
    assert differences(result, open_model("net", options)) == []
    found = ", ".join(differences(result, open_model("other", options)))
    assert message in found
    assert ("other weights" in found) == (name in ("weights", "layers"))


def test_prompts_count_and_files_do_where_no_weights_are_known(folder: Path) -> None:
    write_sd(folder / "net")
    write_prompts(folder)
    (folder / "others.txt").write_text("a hat\n")
    result = result_for(Path("net"), PROMPTED)
    model = open_model("net", {**PROMPTED, "prompts": "others.txt"})
    assert differences(result, model) == ["other labels or prompts"]
    unknown = result.model.model_copy(update={"weights": None, "sha256": "another"})
    old = result.model_copy(update={"model": unknown})
    assert differences(old, open_model("net", PROMPTED)) == ["other files, of weights or configs"]


def test_commands_say_it_beside_what_they_print(folder: Path, adopt: Adopt) -> None:
    for place in ("net", "other"):
        write_ddpm(folder / place)
    other_weights(folder / "other")
    result = result_for(Path("net"), {"clip": True})
    table = {"extractor": "pixels", "reference": "images.npz", "held_out_images": 8, "held_out_banks": 2}
    score = result.config.score.model_validate(table)
    write_images(folder / "images.npz")
    result.model_copy(update={"config": result.config.model_copy(update={"score": score})}).write("best.json")
    line = "warning: model other is not the one that the result of study 'mine' was found on: other weights"
    for command in (("score",), ("sample", "--images", "2", "--out", "grid.png")):
        own = adopt(*command, "--result", "best.json")
        assert (own.code, "found on" in own.err) == (0, False)
        changed = adopt(*command, "--result", "best.json", "--set", "model.source='other'")
        assert changed.code == 0
        assert line in " ".join(changed.err.split())
        assert "found on" not in changed.out


def write_images(path: Path) -> None:
    import numpy as np

    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (900, 16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["weights", "scale", "size"])
def test_a_pipeline_of_another_model_is_warned_of_once(folder: Path, name: str) -> None:
    import diffusers

    write, change, _ = CHANGED[name]
    write_prompts(folder)
    write(folder / "net")
    result = result_for(Path("net"), PROMPTED if write is write_sd else None)
    change(folder / "net")
    pipe = getattr(diffusers, result.model.kind).from_pretrained("net")
    message = {
        "weights": "found on: other weights, or adapters to them",
        "scale": "found on: latent scale 0.13025 instead of 0.18215",
        "size": "found on: sample_size 32 instead of 16x16",
    }
    with pytest.warns(UserWarning, match=message[name]):
        apply(pipe, result)


def test_the_same_weights_in_half_precision_or_offloaded_are_no_others(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = make_unet()
    sample = weights_sample(unet)
    assert len(sample) == 24
    assert weights_of(torch.compile(unet, backend="eager"), sample) == sample
    result = example(model={"weights": sample, "shape": (3, 16, 16)})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        apply(DDPMPipeline(make_unet().to(dtype), DDPMScheduler()), result)
    apply(DDPMPipeline(make_unet().to("meta"), DDPMScheduler()), result)


@pytest.mark.parametrize("matrices", [True, False])
def test_weights_changed_by_more_than_rounding_are_others(matrices: bool) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = make_unet()
    result = example(model={"weights": weights_sample(unet), "shape": (3, 16, 16)})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in unet.parameters():
            if (weight.ndim > 1) == matrices:
                weight.add_(weight * 0.009 if matrices else torch.randn(weight.shape, generator=generator))
    with pytest.warns(UserWarning, match="found on: other weights"):
        apply(DDPMPipeline(unet, DDPMScheduler()), result)


def test_a_sample_of_fewer_weights_is_compared() -> None:
    sample = weights_sample(make_unet())
    part = dict([*sample.items()][:12])
    assert same_weights(part, sample)
    assert not same_weights(sample, part)


def test_a_result_of_a_study_called_uniform_does_not_take_its_place(quick: optuna.Study) -> None:
    found = load_study("quick").best_schedule.model_copy(update={"study": "uniform"})
    compared = open_images(found).compared
    assert [candidate.timesteps for candidate in compared.values()] == [(666, 333, 0), found.timesteps]
