"""A plain list of timesteps in a pipeline: the images of a result with those timesteps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_results import ours, result_for
from tiny_models import make_unet, write_ddpm, write_dit
from tiny_pipelines import write_flux, write_prompts, write_sd, write_sd3, write_sdxl

from autodiffusion_optuna import apply, remove
from autodiffusion_optuna.errors import AdoptError, ConfigError
from autodiffusion_optuna.evaluation.models import DIGITS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TIMESTEPS = [951, 600, 333, 40]
KINDS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "ddpm": (write_ddpm, "DDPMPipeline", "dpmpp_2m"),
    "dit": (lambda folder: write_dit(folder, num_embeds_ada_norm=1000), "DiTPipeline", "unipc_2"),
    "sd": (write_sd, "StableDiffusionPipeline", "dpmpp_2m"),
    "sdxl": (write_sdxl, "StableDiffusionXLPipeline", "ddim"),
    "sd3": (lambda folder: write_sd3(folder, t5=True), "StableDiffusion3Pipeline", "ddim"),
}


def drawn(pipe: Any, scale: float | None) -> torch.Tensor:
    """uint8 [2, H, W, C] of a pipeline; ``scale``: of guidance, where it has any."""
    pipe.set_progress_bar_config(disable=True)
    name, given = type(pipe).__name__, {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 4}
    if name == "DiTPipeline":
        found = pipe(class_labels=[3, 7], guidance_scale=scale, **given)
    elif name.startswith(("Stable", "Flux")):
        found = pipe(["a cat", "two dogs, far away"], height=32, width=32, guidance_scale=scale, **given)
    else:
        found = pipe(batch_size=2, **given)
    return torch.stack([torch.from_numpy(np.array(image)) for image in found.images])


def loaded(name: str, folder: Path) -> Any:
    import diffusers

    return getattr(diffusers, name).from_pretrained(folder)


def options(name: str, folder: Path) -> dict[str, Any]:
    text = name.startswith(("Stable", "Flux"))
    return {"prompts": str(write_prompts(folder)), "size": [32, 32]} if text else {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_with_a_solver_draws_what_a_result_with_it_does(tmp_path: Path, kind: str) -> None:
    write, name, solver = KINDS[kind]
    write(tmp_path / "net")
    fields: dict[str, Any] = {"solver": solver, "timesteps": tuple(TIMESTEPS)}
    result = result_for(tmp_path / "net", options(name, tmp_path), **fields)
    pipe = loaded(name, tmp_path / "net")
    before = pipe.scheduler
    wanted = drawn(apply(pipe, result), result.guidance)
    found = drawn(apply(pipe, TIMESTEPS[::-1], solver=solver), result.guidance)
    assert torch.equal(found, wanted)
    assert remove(pipe).scheduler is before
    assert torch.equal(drawn(apply(pipe, json.loads(result.text())), result.guidance), wanted)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_a_flows_own_scheduler_takes_the_list_for_the_size_it_draws(tmp_path: Path, name: str) -> None:
    write_flux(tmp_path / "net") if name == "FluxPipeline" else write_sd3(tmp_path / "net", t5=True)
    fields: dict[str, Any] = {"solver": "ddim", "timesteps": tuple(TIMESTEPS)}
    result = result_for(tmp_path / "net", options(name, tmp_path), **fields)
    pipe = loaded(name, tmp_path / "net")
    found = drawn(apply(pipe, TIMESTEPS), result.guidance).permute(0, 3, 1, 2).int()
    assert int((found - ours(result, 2, [0, 1]).int()).abs().max()) <= 2
    if name == "FluxPipeline":
        with pytest.raises(ConfigError, match="depends on the size of its images"):
            apply(remove(pipe), TIMESTEPS, solver="ddim")


def test_the_digits_pipeline_takes_a_list_as_it_is() -> None:
    result = result_for(DIGITS, solver="ddim", timesteps=tuple(TIMESTEPS))
    pipe = apply(loaded("DDIMPipeline", DIGITS), np.array(TIMESTEPS))
    pipe.set_progress_bar_config(disable=True)
    found = pipe(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
    wanted = ours(result, 2).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.round(found.images * 255) - wanted).max() <= 2


def test_a_scheduler_that_takes_lists_keeps_to_its_own_steps(tmp_path: Path) -> None:
    """DDPM adds noise, as no solver of the search does on a list."""
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    found = drawn(apply(pipe, TIMESTEPS), None)
    assert type(pipe.scheduler) is DDPMScheduler
    assert pipe.scheduler.timesteps.tolist() == TIMESTEPS
    assert torch.equal(drawn(pipe, None), found)
    assert not torch.equal(drawn(apply(pipe, TIMESTEPS, solver="ddim"), None), found)
    apply(pipe, TIMESTEPS)
    with pytest.warns(UserWarning, match="num_inference_steps=9.*the list of timesteps is applied, .* its own 4 steps"):
        pipe(batch_size=1, num_inference_steps=9)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "twice": ([5, 5, 1], {}, r"\[5, 5, 1\] have 5 twice"),
    "in no order": ([5, 1, 3], {}, "neither descend nor ascend; sort them"),
    "beyond": ([1000, 3], {}, r"not all in \[0, 999\]"),
    "negative": ([3, -1], {}, r"not all in \[0, 999\]"),
    "fractions": ([3.5, 1], {}, "not all integers"),
    "bools": ([True, False], {}, "not all integers"),
    "none": ([], {}, "an empty list"),
    "a number": (3, {}, "a int was given; give a Result"),
    "no such file": ("gone.json", {}, "cannot read result"),
    "another dict": ({"format": 4}, {}, "field 'study' is missing"),
    "no such solver": ([5, 1], {"solver": "dim"}, "unknown solver 'dim'; did you mean 'ddim'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_lists_are_refused_and_nothing_is_changed(name: str) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    before = pipe.scheduler
    given, keywords, message = WRONG[name]
    with pytest.raises(AdoptError, match=message):
        apply(pipe, given, **keywords)
    assert pipe.scheduler is before


def test_schedulers_that_take_no_list_name_the_solvers() -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, PNDMScheduler

    with pytest.raises(ConfigError, match=r"PNDMScheduler takes no list of timesteps; .*solver='dpmpp_2m'"):
        apply(DDPMPipeline(make_unet(), PNDMScheduler()), TIMESTEPS)
    with pytest.raises(ConfigError, match=r"clips otherwise than to \[-1, 1\]"):
        apply(DDPMPipeline(make_unet(), DDIMScheduler(clip_sample_range=2.0)), TIMESTEPS)
    with pytest.raises(ConfigError, match="has no scheduler"):
        apply(object(), TIMESTEPS)


def test_a_flow_with_a_scheduler_for_noise_needs_a_solver(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe = loaded("StableDiffusion3Pipeline", write_sd3(tmp_path / "net", t5=True))
    pipe.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    with pytest.raises(ConfigError, match=r"DPMSolverMultistepScheduler takes no list of timesteps; name one"):
        apply(pipe, TIMESTEPS)
    assert apply(pipe, TIMESTEPS, solver="dpmpp_2m").scheduler.config.use_flow_sigmas
