"""An exported script, run as printed on an unmodified model, draws the images of our own sampler."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_results import example, ours, result_for, run_script
from PIL import Image
from tiny_models import make_unet, make_vae, write_class_conditional, write_cosine, write_ddpm, write_dit
from tiny_pipelines import write_flux, write_prompts, write_sd, write_sd3, write_sdxl

from autodiffusion_optuna.export.formats import result_text
from autodiffusion_optuna.export.result import BaselinePart, ConfigPart, HeldOutPart, ScorePart
from autodiffusion_optuna.export.scripts import PROMPT, diffusers_script

pytestmark = pytest.mark.filterwarnings("ignore:algorithm_type dpmsolver is deprecated:FutureWarning")

TIMESTEPS = (951, 600, 333, 40)
SKIPS = ((1, 2), (), (0,), (2,))


def flat(folder: Path) -> None:
    """A network with its scheduler beside it: no pipeline."""
    from diffusers import DDPMScheduler

    make_unet(in_channels=1, out_channels=1).save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)


def learned_variance(folder: Path) -> None:
    write_ddpm(folder, out_channels=6)


def without_betas(folder: Path) -> None:
    """As written by hand: the config leaves out what are defaults, which Heun's scheduler has others of."""
    write_ddpm(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DDPMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000}'
    )


def flowing(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    make_unet().save_pretrained(folder / "unet")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_beta_sigmas=True).save_pretrained(folder / "scheduler")


def latent(folder: Path) -> None:
    from diffusers import DDPMScheduler

    make_unet(in_channels=4, out_channels=4, sample_size=8).save_pretrained(folder / "unet")
    make_vae().save_pretrained(folder / "vae")
    DDPMScheduler().save_pretrained(folder / "scheduler")


def forget_parts(folder: Path) -> None:
    """Leave out of the pipeline's index the parts that it says it has not."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({name: part for name, part in index.items() if part != [None, None]}))


Case = tuple[Callable[[Path], Any], dict[str, Any], dict[str, Any]]
NETWORKS: dict[str, Case] = {
    "ddim": (write_ddpm, {}, {"solver": "ddim"}),
    "ddim-first": (write_ddpm, {"clip": False}, {"solver": "ddim", "final": "sigma_min"}),
    "ddim-eta": (write_ddpm, {}, {"solver": "ddim", "eta": 1.0}),
    "dpmpp_2m-flat": (flat, {}, {"solver": "dpmpp_2m"}),
    "dpmpp_3m-variance": (learned_variance, {}, {"solver": "dpmpp_3m", "final": "sigma_min"}),
    "dpmpp_2s-latent": (latent, {}, {"solver": "dpmpp_2s"}),
    "dpm_solver_2": (write_ddpm, {}, {"solver": "dpm_solver_2"}),
    "heun": (write_ddpm, {}, {"solver": "heun"}),
    "heun-defaults": (without_betas, {}, {"solver": "heun"}),
    "heun-far-apart": (write_cosine, {}, {"solver": "heun", "timesteps": (999, 500)}),
    "heun-far-apart-first": (write_cosine, {}, {"solver": "heun", "timesteps": (999, 500), "final": "sigma_min"}),
    "heun-short-end": (write_ddpm, {}, {"solver": "heun", "timesteps": (999, 5)}),
    "heun-first": (write_ddpm, {}, {"solver": "heun", "final": "sigma_min"}),
    "lms": (write_ddpm, {"clip": False}, {"solver": "lms"}),
    "unipc_3": (write_ddpm, {}, {"solver": "unipc_3"}),
    "deis_3": (write_ddpm, {}, {"solver": "deis_3"}),
    "flow-clipped": (flowing, {}, {"solver": "ddim"}),
    "flow-euler": (flowing, {"clip": False}, {"solver": "euler"}),
    "classes": (write_class_conditional, {}, {"solver": "dpmpp_2m"}),
    "classes-guided": (
        write_class_conditional,
        {"fields": {"null_class": 1}},
        {"solver": "ddim", "guidance": 2.5},
    ),
}


MASKED = ("ddim", "heun-first", "lms", "dpmpp_2s-latent", "classes-guided")


@pytest.mark.parametrize(
    ("name", "masked"), [(name, False) for name in NETWORKS] + [(name, True) for name in MASKED], ids=str
)
def test_the_script_of_a_network_draws_our_images(folder: Path, name: str, masked: bool) -> None:
    write, options, fields = NETWORKS[name]
    write(folder / "net")
    if masked:
        fields = {**fields, "skips": SKIPS}
    result = result_for(Path("net"), options, **{"timesteps": TIMESTEPS, **fields})
    classes = [] if "classes" not in name else [i % (4 if "guided" in name else 5) for i in range(16)]
    drawn = run_script(folder, result)
    assert drawn.shape == (16, *result.model.image_shape)
    assert int((drawn - ours(result, 16, classes).int()).abs().max()) <= 2
    assert ("autodiffusion_optuna" in (folder / "mine.py").read_text()) == masked


PIPELINES: dict[str, Case] = {
    "sd-dpmpp_2m": (write_sd, {}, {"solver": "dpmpp_2m", "guidance": 5.0}),
    "sd-unipc_2": (write_sd, {"negative_prompt": "a dog"}, {"solver": "unipc_2", "final": "sigma_min"}),
    "sd-heun": (write_sd, {}, {"solver": "heun"}),
    "sd-v-deis_2": (lambda folder: write_sd(folder, "v_prediction"), {}, {"solver": "deis_2"}),
    "sdxl-ddim": (write_sdxl, {}, {"solver": "ddim"}),
    "sd3-ddim": (lambda folder: write_sd3(folder, t5=True), {}, {"solver": "ddim"}),
    "sd3-without-t5": (write_sd3, {}, {"solver": "ddim"}),
    "sd3-index-without-t5": (lambda folder: write_sd3(folder) and forget_parts(folder), {}, {"solver": "ddim"}),
    "sd-index-without-checker": (lambda folder: write_sd(folder) and forget_parts(folder), {}, {"solver": "ddim"}),
    "sd3-unipc_2": (lambda folder: write_sd3(folder, t5=True), {}, {"solver": "unipc_2", "guidance": 4.0}),
    "flux-euler": (write_flux, {}, {"solver": "euler", "guidance": 2.0}),
    "flux-dpmpp_2m": (write_flux, {}, {"solver": "dpmpp_2m", "final": "sigma_min"}),
    "dit-dpmpp_2m": (lambda folder: write_dit(folder, num_embeds_ada_norm=1000), {}, {"solver": "dpmpp_2m"}),
    "dit-deis_2": (lambda folder: write_dit(folder), {}, {"solver": "deis_2", "guidance": 1.0}),
    "dit-heun": (lambda folder: write_dit(folder), {}, {"solver": "heun", "guidance": 1.0}),
}
MASKED_PIPELINES = ("sd-heun", "sdxl-ddim", "flux-dpmpp_2m", "dit-heun")
NEEDS_APPLY = ("dit-heun",)  # a scheduler of states that this pipeline does not scale


@pytest.mark.parametrize("name", PIPELINES)
def test_the_script_of_a_pipeline_draws_our_images(folder: Path, name: str) -> None:
    write, options, fields = PIPELINES[name]
    write(folder / "net")
    chosen = [0, 1, 2, 3]
    if not name.startswith("dit"):
        (folder / "prompts.txt").write_text("a photograph of a cat\n")
        options = {**options, "prompts": "prompts.txt", "size": [32, 32]}
        chosen = [0]
    for masks in ({}, {"skips": SKIPS}) if name in MASKED_PIPELINES else ({},):
        result = result_for(Path("net"), options, timesteps=TIMESTEPS, **fields, **masks)
        drawn = run_script(folder, result)
        assert int((drawn - ours(result, len(chosen), chosen).int()).abs().max()) <= 2
        uses_us = "autodiffusion_optuna" in (folder / "mine.py").read_text()
        assert uses_us == (bool(masks) or name in NEEDS_APPLY)


PACKAGE: dict[str, tuple[Case, str]] = {
    "plms": ((write_ddpm, {}, {"solver": "plms", "skips": SKIPS}), "no scheduler that takes the steps of plms"),
    "eta": ((write_ddpm, {}, {"solver": "ddim", "eta": 0.5}), "with eta = 0.5"),
    "capped": (
        (write_ddpm, {"clip": False}, {"solver": "deis_2", "amplification_cap": 4.0}),
        "with an amplification cap of 4",
    ),
    "sd": (
        (write_sd, {"prompts": "prompts.txt", "size": [32, 32], "negative_prompt": "a dog"}, {"solver": "plms_ab"}),
        "no scheduler that takes the steps of plms_ab",
    ),
    "below 1": ((write_dit, {}, {"guidance": 0.5}), "apply no guidance below a scale of 1"),
}


@pytest.mark.parametrize("name", PACKAGE)
def test_where_diffusers_falls_short_our_sampler_is_used_and_the_script_says_why(folder: Path, name: str) -> None:
    (write, options, fields), why = PACKAGE[name]
    write(folder / "net")
    (folder / "prompts.txt").write_text(f"a dog\n{PROMPT}\n")
    result = result_for(Path("net"), options, timesteps=TIMESTEPS, **fields)
    assert why in result_text(result, "diffusers")
    drawn = run_script(folder, result)
    count, chosen = {"sd": (2, [1, 1]), "below 1": (2, [0, 1])}.get(name, (16, [0] * 16))
    assert torch.equal(drawn, ours(result, count, chosen).int())


@pytest.mark.parametrize("images", [None, 3])
def test_a_script_of_our_own_sampler_needs_neither_the_studys_prompts_nor_the_cpu(
    folder: Path, images: int | None
) -> None:
    write_sd(folder / "net")
    options = {"prompts": str(write_prompts(folder).resolve()), "size": [32, 32]}
    result = result_for(Path("net"), options, timesteps=TIMESTEPS, solver="plms_ab")
    Path(options["prompts"]).unlink()
    result.write("mine.json")
    script = diffusers_script(result, images=images)
    assert options["prompts"] not in script
    assert "cpu" not in script.replace(".cpu()", "")
    Path("mine.py").write_text(script)
    names = runpy.run_path("mine.py")
    assert names["images"].shape == (images or 2, 3, 32, 32)
    assert names["PROMPTS"] == [PROMPT] * (images or 2)


SAVED: dict[str, tuple[Case, tuple[int, int], int]] = {
    "network": ((write_ddpm, {}, {}), (4, 4), 6),
    "grey": ((flat, {}, {}), (4, 4), 6),
    "latent": ((latent, {}, {"solver": "heun"}), (4, 4), 6),
    "masked": ((write_ddpm, {}, {"skips": SKIPS}), (4, 4), 6),
    "package": ((write_ddpm, {}, {"solver": "plms"}), (4, 4), 6),
    "dit": ((write_dit, {}, {"guidance": 1.0}), (1, 4), 1),
    "text": ((write_sd, {"prompts": "prompts.txt", "size": [32, 32]}, {}), (1, 1), 1),
    "text-package": ((write_sd, {"prompts": "prompts.txt", "size": [32, 32]}, {"solver": "plms_ab"}), (1, 2), 3),
}
"""Kind -> its case, (rows, columns) of the picture, and the factor by which the images are enlarged in it."""


@pytest.mark.parametrize("kind", SAVED)
def test_a_script_saves_a_picture_of_its_images_and_takes_a_seed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (write, options, fields), (rows, columns), scale = SAVED[kind]
    write(folder / "net")
    (folder / "prompts.txt").write_text(f"{PROMPT}\n")
    drawn = run_script(folder, result_for(Path("net"), options, timesteps=TIMESTEPS, **fields))
    assert not (folder / "mine.png").exists()  # only where it is the program
    for arguments in ([], ["--out", "other.png", "--seed", "1"]):
        monkeypatch.setattr(sys, "argv", ["mine.py", *arguments])
        runpy.run_path("mine.py", run_name="__main__")
    assert capsys.readouterr().out.endswith("wrote mine.png\nwrote other.png\n")
    pictures = [np.array(Image.open(name).convert("RGB")).astype(int) for name in ("mine.png", "other.png")]
    shown = pictures[0][::scale, ::scale]
    count, channels, height, width = drawn.shape
    assert count == rows * columns
    assert shown.shape == (rows * height, columns * width, 3)
    cells = shown.reshape(rows, height, columns, width, 3).transpose(0, 2, 4, 1, 3).reshape(count, 3, height, width)
    assert np.array_equal(cells[:, :channels], drawn.numpy())
    assert pictures[1].shape == pictures[0].shape
    assert not np.array_equal(*pictures)


def test_plain_scripts_run_where_this_package_is_not(folder: Path) -> None:
    write_ddpm(folder / "net")
    result = result_for(Path("net"), solver="dpmpp_2m", timesteps=TIMESTEPS)
    (folder / "mine.py").write_text(result_text(result, "diffusers"))
    code = (
        "import sys; sys.modules['autodiffusion_optuna'] = None\n"
        "import runpy, torch; torch.save(runpy.run_path('mine.py')['images'], 'images.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True)
    drawn = torch.load(folder / "images.pt", weights_only=True).int()
    assert int((drawn - ours(result, 16).int()).abs().max()) <= 2


def test_scripts_load_the_model_as_the_study_did() -> None:
    """Hub ids and single files cannot be run here; their lines are compared."""

    def script(**model: Any) -> str:
        part = {"kind": "StableDiffusionPipeline", "guidance": "free", **model}
        config: Any = {"source": part.get("source", "net"), "config": "base"}
        sections = ConfigPart.model_validate({"model": config, "score": {"extractor": "clip"}})
        text = result_text(example(model=part, guidance=7.5, config=sections), "diffusers")
        compile(text, "mine.py", "exec")
        return text

    hub = script(source="org/name@v1")
    assert "MODEL = 'org/name'\n" in hub
    assert "StableDiffusionPipeline.from_pretrained(MODEL, revision='v1')\n" in hub
    assert "from_single_file(MODEL, config='base')" in script(source="sd.safetensors")
    assert "torch_dtype=torch.bfloat16" in script(precision="bfloat16")
    assert "no pipeline for this model (adm)" in result_text(example(model={"kind": "adm"}), "diffusers")


def test_a_script_of_our_own_sampler_loads_the_model_with_the_studys_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {
        "source": "adm:x.pt",
        "device": "cuda:3",
        "compile": True,
        "precision": "bfloat16",
        "preset": "imagenet64",
        "fields": {"num_classes": 5},
        "classifier": "c.pt",
    }
    config = ConfigPart.model_validate({"model": model, "score": {"extractor": "clip"}})
    loaded: list[tuple[Any, bool]] = []
    monkeypatch.setattr(
        "autodiffusion_optuna.evaluation.models.load_model", lambda given, trust=False: loaded.append((given, trust))
    )
    monkeypatch.setattr(
        "autodiffusion_optuna.export.draw.draw", lambda *_, images, seed: torch.zeros(images, 3, 16, 16)
    )
    for kind in ("adm", "plugin"):
        run_script(tmp_path, example(model={"kind": kind, "source": "adm:x.pt"}, config=config))
    anywhere = config.model.model_copy(update={"device": "auto", "compile": False})
    assert loaded == [(anywhere, False), (anywhere, True)]


def test_a_script_says_what_it_scored() -> None:
    held_out = HeldOutPart(mean=12.345, low=12.0, high=12.7, images=5000, banks=3)
    score = ScorePart(metric="FID", value=11.0, images=500, held_out=held_out)
    assert "ddim, 3 steps, FID 12.35 on 3 x 5000 held-out images." in result_text(example(score=score), "diffusers")
    assert "FD(pixels) 1.25 on the search's 64 images." in result_text(example(), "diffusers")
    baseline = BaselinePart(name="uniform, solver ddim", timesteps=(666, 333, 0), value=20.5)
    text = result_text(example(score=score.model_copy(update={"baseline": baseline})), "diffusers")
    assert "FID 12.35 on 3 x 5000 held-out images, 20.5 with uniform, solver ddim." in text
