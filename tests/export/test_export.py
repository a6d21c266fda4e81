"""An exported script, run as printed on an unmodified model, draws the images of our own sampler."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Adopt
from example_schedules import example, ours, schedule_of
from tiny_models import make_unet, make_vae, write_class_conditional, write_ddpm, write_dit
from tiny_pipelines import write_flux, write_prompts, write_sd, write_sd3, write_sdxl
from torch import Tensor

from autodiffusion_optuna import Result
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError, StudyError
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.export.schedule import ConfigPart, HeldOutPart, ScorePart
from autodiffusion_optuna.export.scripts import (
    FORMS,
    PROMPT,
    diffusers_script,
    export_result,
    export_text,
    load_schedule,
    notes,
    result_of,
    result_text,
)
from autodiffusion_optuna.noise import flow, linear
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.storage.url import storage_url
from autodiffusion_optuna.study import transfer
from autodiffusion_optuna.study.transfer import check_script, differences

pytestmark = pytest.mark.filterwarnings("ignore:algorithm_type dpmsolver is deprecated:FutureWarning")

TIMESTEPS = (951, 600, 333, 40)
SKIPS = ((1, 2), (), (0,), (2,))


def run(folder: Path, schedule: Result) -> Tensor:
    """int32 [B, C, H, W] that the script draws, run as printed in the folder of its JSON."""
    schedule.write(folder / f"{schedule.study}.json")
    script = folder / f"{schedule.study}.py"
    script.write_text(result_text(schedule, "diffusers"))
    images = runpy.run_path(str(script))["images"]
    if isinstance(images, Tensor):
        return images.int()
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).int()


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


def cosine(folder: Path) -> None:
    """Its highest level has sigma / alpha = 20291."""
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(make_unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)


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
    "heun-far-apart": (cosine, {}, {"solver": "heun", "timesteps": (999, 500)}),
    "heun-far-apart-first": (cosine, {}, {"solver": "heun", "timesteps": (999, 500), "final": "sigma_min"}),
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
    schedule = schedule_of(Path("net"), options, **{"timesteps": TIMESTEPS, **fields})
    classes = [] if "classes" not in name else [i % (4 if "guided" in name else 5) for i in range(16)]
    drawn = run(folder, schedule)
    assert drawn.shape == (16, *(schedule.model.image_shape or ()))
    assert int((drawn - ours(schedule, 16, classes).int()).abs().max()) <= 2
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
        schedule = schedule_of(Path("net"), options, timesteps=TIMESTEPS, **fields, **masks)
        drawn = run(folder, schedule)
        assert int((drawn - ours(schedule, len(chosen), chosen).int()).abs().max()) <= 2
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
    schedule = schedule_of(Path("net"), options, timesteps=TIMESTEPS, **fields)
    assert why in result_text(schedule, "diffusers")
    drawn = run(folder, schedule)
    count, chosen = {"sd": (2, [1, 1]), "below 1": (2, [0, 1])}.get(name, (16, [0] * 16))
    assert torch.equal(drawn, ours(schedule, count, chosen).int())


@pytest.mark.parametrize("images", [None, 3])
def test_a_script_of_our_own_sampler_needs_neither_the_studys_prompts_nor_the_cpu(
    folder: Path, images: int | None
) -> None:
    write_sd(folder / "net")
    options = {"prompts": str(write_prompts(folder).resolve()), "size": [32, 32]}
    schedule = schedule_of(Path("net"), options, timesteps=TIMESTEPS, solver="plms_ab")
    Path(options["prompts"]).unlink()
    schedule.write("mine.json")
    script = diffusers_script(schedule, images=images)
    assert options["prompts"] not in script
    assert 'device="auto"' in script
    Path("mine.py").write_text(script)
    names = runpy.run_path("mine.py")
    assert names["images"].shape == (images or 2, 3, 32, 32)
    assert names["PROMPTS"] == [PROMPT] * (images or 2)
    reduced = schedule.model_copy(update={"model": schedule.model.model_copy(update={"precision": "bfloat16"})})
    assert "reduced=True" in diffusers_script(reduced)


def test_plain_scripts_run_where_this_package_is_not(folder: Path) -> None:
    write_ddpm(folder / "net")
    schedule = schedule_of(Path("net"), solver="dpmpp_2m", timesteps=TIMESTEPS)
    (folder / "mine.py").write_text(result_text(schedule, "python"))
    code = (
        "import sys; sys.modules['autodiffusion_optuna'] = None\n"
        "import runpy, torch; torch.save(runpy.run_path('mine.py')['images'], 'images.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True)
    drawn = torch.load(folder / "images.pt", weights_only=True).int()
    assert int((drawn - ours(schedule, 16).int()).abs().max()) <= 2


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
    adm = result_text(example(model={"kind": "adm", "source": "adm:x.pt"}, config=adm_config()), "diffusers")
    compile(adm, "mine.py", "exec")
    assert "no pipeline for this model (adm)" in adm
    assert "import load_model" in adm
    arguments = "source='adm:x.pt', preset='imagenet64', fields={'num_classes': 5}, classifier='c.pt'"
    assert f"model = load_model(ModelConfig({arguments}))\n" in adm
    assert "trust=True" in result_text(example(model={"kind": "plugin"}, config=adm_config()), "diffusers")


def adm_config() -> ConfigPart:
    model = {"source": "x", "preset": "imagenet64", "fields": {"num_classes": 5}, "classifier": "c.pt"}
    return ConfigPart.model_validate({"model": model, "score": {"extractor": "clip"}})


# ComfyUI


def sigmas(schedule: Result) -> tuple[list[str], list[float]]:
    """What is said beside it, and the numbers as the node finds them: all of a text, in comments too."""
    text = result_text(schedule, "comfyui")
    assert "e" not in text
    found = [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]
    assert len(found) == len(schedule.timesteps) + 1
    return notes(schedule, "comfyui"), found


def test_comfyui_is_given_sigma_over_alpha() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    from autodiffusion_optuna.noise import scaled_linear

    timesteps = (999, 613, 208, 0)
    part = {"kind": "StableDiffusionPipeline", "guidance": "free"}
    schedule = example(scaled_linear(), timesteps=timesteps, solver="dpmpp_2m", guidance=7.5, model=part)
    said, found = sigmas(schedule)
    wanted = [*(((1 - abar[t]) / abar[t]) ** 0.5 for t in timesteps), 0.0]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert found[0] == pytest.approx(14.614642, abs=1e-4)  # sigma_max of Stable Diffusion in k-diffusion
    assert said[1:] == ["Sampler: dpmpp_2m.", "Guidance: 7.5 (cfg)."]
    last = sigmas(example(scaled_linear(), timesteps=timesteps, final="sigma_min"))[1][-1]
    assert last == pytest.approx(((1 - abar[0]) / abar[0]) ** 0.5, rel=1e-9)


def test_comfyui_is_given_the_levels_of_a_flow() -> None:
    part = {"kind": "FluxPipeline", "prediction": "flow_prediction", "guidance": "embedded"}
    schedule = example(flow(1000, 3.0), timesteps=(999, 500, 3), guidance=3.5, model=part)
    said, found = sigmas(schedule)
    u = np.array([1000, 501, 4]) / 1001
    np.testing.assert_allclose(found, [*(3 * u / (1 + 2 * u)), 0.0], atol=1e-11)
    assert said[1:] == ["Sampler: euler.", "Guidance: 3.5 (guidance of FluxGuidance, with a cfg of 1)."]
    assert "another coordinate" in sigmas(schedule.model_copy(update={"solver": "heun"}))[0][1]
    stochastic = schedule.model_copy(update={"solver": "ddim", "eta": 0.5})
    assert "euler_ancestral (approximately" in sigmas(stochastic)[0][1]


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"solver": "euler"}, "Sampler: euler."),
        ({"solver": "heun"}, "Sampler: heun."),
        ({"solver": "lms"}, "Sampler: lms."),
        ({"solver": "unipc_3"}, "Sampler: uni_pc_bh2 (approximately"),
        ({"solver": "deis_3"}, "Sampler: deis (approximately"),
        ({"solver": "plms"}, "Sampler: ipndm (approximately"),
        ({"eta": 0.5}, "Sampler: euler_ancestral (set eta = 0.5"),
        ({"solver": "plms_ab"}, "Sampler: ComfyUI has none that takes the steps of plms_ab; the nearest is euler."),
        ({"solver": "deis_2", "amplification_cap": 4.0}, "ComfyUI has none that takes the steps of deis_2 with"),
        ({"skips": (("a",), (), ())}, "ComfyUI cannot skip layers by step"),
        ({"solver": "dpmpp_2m", "final": "sigma_min"}, "may be of a higher order"),
        ({}, "The first level is not the model's highest"),
        ({}, "ComfyUI has no loader for this model (UNet2DModel)"),
        ({"model": {"kind": "adm"}}, "ComfyUI has no loader for this model (adm)"),
    ],
)
def test_comfyui_is_told_what_differs(fields: dict[str, Any], note: str) -> None:
    assert any(note in line for line in sigmas(example(**fields))[0])


def test_euler_ancestral_is_ddim_with_eta() -> None:
    """What the note promises: k-diffusion's ancestral step, in sigma / alpha, is DDIM's with the same eta."""
    noise = linear()
    for s, t in ((901, 500), (500, 40)):
        high, low = (noise.sigma(i) / noise.alpha(i) for i in (s, t))
        up = 0.7 * (low**2 * (high**2 - low**2) / high**2) ** 0.5
        held_out = (
            0.7 * noise.sigma(t) * (1 - (noise.alpha(s) * noise.sigma(t) / noise.alpha(t) / noise.sigma(s)) ** 2) ** 0.5
        )
        assert up == pytest.approx(held_out / noise.alpha(t), rel=1e-12)


# Forms and studies


def test_forms_that_do_not_exist_or_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown format 'comfy'; did you mean 'comfyui'"):
        result_text(example(), "comfy")
    for form in {*FORMS} - {"json"}:
        with pytest.raises(ConfigError, match="mixture is not a model of diffusers or ComfyUI; export it with"):
            result_text(example(model={"kind": "mixture"}), form)
        with pytest.raises(ConfigError, match="no noise levels, being of an older version; continue the study"):
            result_text(example().model_copy(update={"noise": None}), form)
    assert result_text(example(), "json") == example().text()
    assert result_text(example(), "python") == result_text(example(), "diffusers")


def test_a_script_says_what_it_scored() -> None:
    held_out = HeldOutPart(mean=12.345, low=12.0, high=12.7, images=5000, banks=3)
    score = ScorePart(metric="FID", value=11.0, images=500, held_out=held_out)
    assert "ddim, 3 steps, FID 12.35 on 3 x 5000 held-out images." in result_text(example(score=score), "python")
    assert "FD(pixels) 1.25 on the search's 64 images." in result_text(example(), "python")


def searched(adopt: Adopt, folder: Path, *settings: str) -> Any:
    """A finished study of nine trials on a small real model."""
    write_ddpm(folder / "net", sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    given = ["name=mine", "model.source=net", "score.reference=images.npz", "search.trials=9"]
    given += ["score.images=16", "score.held_out_images=16", *settings]
    arguments = [argument for setting in given for argument in ("--set", setting)]
    ran = adopt("run", "--study", "quick.toml", *arguments)
    assert ran.code == 0, ran
    return load_study(open_storage(storage_url(None)), "mine")


def test_a_study_is_exported_with_everything_that_repeats_it(folder: Path, adopt: Adopt) -> None:
    # A budget below three full steps, so that the best candidate must skip something.
    budget = ["search.max_skip=0.6", "search.max_cost=0.9", "search.trials=14"]
    study = searched(adopt, folder, *budget, "sampling.solver=['deis', 'heun']", "sampling.order=3")
    schedule = export_result(study)
    (folder / "exported").mkdir()
    assert adopt("export", "--study", "mine", "--out", "exported").code == 0
    assert Result.read("exported/mine.json") == schedule
    assert Path("exported/mine.py").read_text() == export_text(study, "python")

    model, best = load_model(ModelConfig(source="net")), study.best_trial
    candidate = load_schedule(Path("exported/mine.json"), model.units)
    chosen = best.user_attrs["candidate"]
    assert chosen.endswith(candidate.key)
    assert f"solver={schedule.solver}" in chosen
    assert schedule.solver in ("deis_3", "heun")
    assert schedule.masked
    assert (schedule.cost, schedule.score.value) == (best.user_attrs["cost"], best.value)
    assert schedule.model.clip
    assert (schedule.model.sha256, schedule.model.kind) == (model.fingerprint, "DDPMPipeline")
    assert schedule.model.shape == schedule.model.image_shape == (3, 8, 8)
    assert schedule.model.units == model.units
    assert schedule.model.weights == model.weights
    assert differences(schedule, model) == []
    np.testing.assert_array_equal(schedule.noise_schedule().alphas, model.schedule.alphas)
    assert schedule.config is not None
    assert Path(schedule.config.model.source) == folder.resolve() / "net"
    assert schedule.guidance is None
    assert schedule.made_with.keys() >= {"autodiffusion_optuna", "optuna", "torch", "diffusers"}
    assert schedule.made_with["torch"].split("+")[0] == torch.__version__.split("+")[0]
    held_out = schedule.score.held_out
    assert held_out is not None
    assert HeldOut(held_out.images, (held_out.low, held_out.mean, held_out.high)).mean == pytest.approx(held_out.mean)

    names = runpy.run_path("exported/mine.py")  # run from another folder than its own
    assert int((names["images"].int() - ours(schedule, 16).int()).abs().max()) <= 2


def test_fixed_settings_are_named_as_solvers_are(folder: Path, adopt: Adopt) -> None:
    settings = ("sampling.solver='unipc'", "sampling.order=3", "sampling.final=['sigma_min']", "model.clip=false")
    schedule = export_result(searched(adopt, folder, *settings))
    assert (schedule.solver, schedule.final, schedule.eta, schedule.model.clip) == ("unipc_3", "sigma_min", 0.0, False)
    assert not schedule.masked


def test_numbers_that_were_searched_are_exported(folder: Path, adopt: Adopt) -> None:
    study = searched(adopt, folder, "sampling.eta={min=0.25, max=0.75}")
    schedule = export_result(study)
    assert schedule.eta == study.best_trial.params["eta"]
    assert f"with eta = {schedule.eta:g}" in result_text(schedule, "python")


def test_a_study_of_the_mixture_is_exported_as_json_alone(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=6").code == 0
    study = load_study(open_storage(storage_url(None)), "quick")
    schedule = Result.parse(export_text(study, "json"))
    assert schedule.model.kind == "mixture"
    with pytest.raises(ConfigError, match="mixture"):
        export_text(study, "comfyui")


def test_a_study_without_a_finished_trial_has_nothing_to_export(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=6").code == 0
    study = load_study(open_storage(storage_url(None)), "quick")
    empty = replace(read_summary(study), best=None)
    with pytest.raises(StudyError, match="no finished trial to export; run it first"):
        result_of(empty)


# The check


def test_a_script_that_draws_our_images_has_no_fault(folder: Path) -> None:
    cosine(folder / "net")
    schedule = schedule_of(Path("net"), solver="heun", timesteps=(999, 500))
    assert check_script(schedule) == (None, None, None)
    write_sd3(folder / "sd3")
    write_prompts(folder)
    options = {"prompts": "prompts.txt", "size": [32, 32]}
    for skips in (((),) * 4, SKIPS):
        assert check_script(schedule_of(Path("sd3"), options, timesteps=TIMESTEPS, skips=skips)) == (None, None, None)


def test_a_script_that_draws_other_images_has_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cosine(folder / "net")
    schedule = schedule_of(Path("net"), solver="heun", timesteps=(999, 500))
    given = transfer.diffusers_script
    monkeypatch.setattr(
        transfer,
        "diffusers_script",
        lambda *a, **k: given(*a, **k).replace(".double()", "").replace("float64", "float32"),
    )
    fault = check_script(schedule).fault
    assert fault is not None
    found = re.fullmatch(r"on this model diffusers' images differ from those of .* sampler by (\d+\.\d) of 255", fault)
    assert found
    assert float(found[1]) > 50
    monkeypatch.setattr(transfer, "diffusers_script", lambda *a, **k: "raise OSError('no such part\\nat all')")
    assert check_script(schedule).fault == "diffusers cannot draw with this model as it is here (OSError: no such part)"
    monkeypatch.setattr(transfer, "diffusers_script", lambda *a, **k: "import no_such_package")
    with pytest.raises(
        ModelError, match=r"it cannot be run here .ModuleNotFoundError: No module named 'no_such_package'"
    ):
        check_script(schedule)


@pytest.mark.parametrize(
    ("found", "fault", "rounding"),
    [
        ((1.0,), None, None),
        ((9.0, 0.2), None, "by 9 of 255 in bfloat16, and by 0.2 in float32"),
        ((9.0, 8.0), "by 9 of 255", None),
        ((9.0, torch.OutOfMemoryError("full")), None, "in bfloat16; they were not compared in float32: it cannot be"),
    ],
)
def test_float32_decides_where_reduced_precision_differs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[Any, ...], fault: str | None, rounding: str | None
) -> None:
    write_sd(folder / "net")
    write_prompts(folder)
    plain = schedule_of(Path("net"), {"prompts": "prompts.txt", "size": [32, 32]}, timesteps=TIMESTEPS)
    assert plain.config is not None
    reduced = {"precision": "bfloat16"}
    config = plain.config.model_copy(update={"model": plain.config.model.model_copy(update=reduced)})
    schedule = plain.model_copy(update={"config": config, "model": plain.model.model_copy(update=reduced)})
    scripts: list[str] = []
    left: list[Any] = [*found]
    given = transfer.diffusers_script

    def noted(*args: Any, **kwargs: Any) -> str:
        scripts.append(given(*args, **kwargs))
        if isinstance(left[0], Exception):
            monkeypatch.setattr(transfer, "_run", lambda _: (_ for _ in ()).throw(left[0]))
        return scripts[-1]

    monkeypatch.setattr(transfer, "diffusers_script", noted)
    monkeypatch.setattr(transfer, "difference", lambda *_: left.pop(0))
    checked = check_script(schedule)
    assert (checked.fault is None) == (fault is None)
    assert (fault or "") in (checked.fault or "")
    assert (checked.rounding is None) == (rounding is None)
    assert (rounding or "") in (checked.rounding or "")
    assert ["torch_dtype=torch.bfloat16" in script for script in scripts] == [True, False][: len(found)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("place", ["_open_for_check", "_drawn", "_run"])
def test_a_model_too_large_for_the_check_is_not_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    cosine(folder / "net")

    def fail(*_: object) -> None:
        raise error("no room")

    monkeypatch.setattr(transfer, place, fail)
    with pytest.raises(ModelError, match=rf"^it cannot be run here \({error.__name__}: no room\)$"):
        check_script(schedule_of(Path("net"), timesteps=(999, 500)))


def test_a_check_that_cannot_be_made_downloads_nothing(folder: Path) -> None:
    write_ddpm(folder / "net")
    schedule = schedule_of(Path("net"), timesteps=TIMESTEPS)
    assert schedule.config is not None
    for source, message in (("gone", "gone"), ("org/name", "'org/name' is not in the hub's cache")):
        model = schedule.model.model_copy(update={"source": source})
        config = schedule.config.model_copy(
            update={"model": schedule.config.model.model_copy(update={"source": source})}
        )
        with pytest.raises(ModelError, match=message):
            check_script(schedule.model_copy(update={"model": model, "config": config}))


def test_the_command_prints_one_text_and_says_the_rest_elsewhere(
    folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(adopt, folder)
    script = adopt("export", "--study", "mine")
    assert (script.code, script.out) == (0, export_text(study, "diffusers"))
    first, *others = script.err.splitlines()  # the others are of the study
    assert first == "comparing the script's images with those of the search's sampler (--no-check leaves it out) …"
    assert Result.parse(adopt("export", "--study", "mine", "--format", "json").out) == export_result(study)
    numbers = adopt("export", "--study", "mine", "--format", "comfyui")
    assert len(re.findall(r"\d+", numbers.out.replace(".", ""))) == len(export_result(study).timesteps) + 1
    assert "paste the numbers into the node ManualSigmas" in numbers.err

    monkeypatch.setattr(transfer, "difference", lambda *_: 94.0)
    other = adopt("export", "--study", "mine", "--out", "there")
    assert (
        "warning: on this model diffusers' images differ from those of the search's sampler by 94 of 255" in other.err
    )
    assert (folder / "there" / "mine.json").is_file()
    assert "import load_model" in (folder / "there" / "mine.py").read_text()
    assert torch.equal(run(folder / "there", export_result(study)), ours(export_result(study), 16).int())
    unchecked = adopt("export", "--study", "mine", "--no-check")
    assert (unchecked.out, unchecked.err.splitlines()) == (script.out, others)

    write_ddpm(folder / "net", sample_size=8, block_out_channels=(8, 32), norm_num_groups=4, attention_head_dim=4)
    assert "warning: model net is not the one that the schedule of study 'mine' was found on: other weights" in (
        adopt("export", "--study", "mine").err
    )
    (folder / "net").rename(folder / "elsewhere")
    moved = adopt("export", "--study", "mine")
    assert moved.code == 0
    assert "from diffusers import" in moved.out
    assert "warning: the script was not checked against the search's sampler" in moved.err
