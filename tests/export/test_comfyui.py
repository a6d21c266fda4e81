"""Sigmas for ComfyUI are its own convention's, and what differs there is said beside them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from example_results import example

from autodiffusion_optuna import Result
from autodiffusion_optuna.export.comfyui import comfyui_notes
from autodiffusion_optuna.export.formats import result_text
from autodiffusion_optuna.noise import flow, linear


def sigmas(result: Result) -> tuple[list[str], list[float]]:
    """What is said beside it, and the numbers as the node finds them: all of a text, in comments too."""
    text = result_text(result, "comfyui")
    assert "e" not in text
    found = [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]
    assert len(found) == len(result.timesteps) + 1
    return comfyui_notes(result), found


def test_comfyui_is_given_sigma_over_alpha() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    from autodiffusion_optuna.noise import scaled_linear

    timesteps = (999, 613, 208, 0)
    part = {"kind": "StableDiffusionPipeline", "guidance": "free"}
    result = example(scaled_linear(), timesteps=timesteps, solver="dpmpp_2m", guidance=7.5, model=part)
    said, found = sigmas(result)
    wanted = [*(((1 - abar[t]) / abar[t]) ** 0.5 for t in timesteps), 0.0]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert found[0] == pytest.approx(14.614642, abs=1e-4)  # sigma_max of Stable Diffusion in k-diffusion
    assert said[1:] == ["Sampler: dpmpp_2m.", "Guidance: 7.5 (cfg)."]
    last = sigmas(example(scaled_linear(), timesteps=timesteps, final="sigma_min"))[1][-1]
    assert last == pytest.approx(((1 - abar[0]) / abar[0]) ** 0.5, rel=1e-9)


def test_comfyui_is_given_the_levels_of_a_flow() -> None:
    part = {"kind": "FluxPipeline", "prediction": "flow_prediction", "guidance": "embedded"}
    result = example(flow(1000, 3.0), timesteps=(999, 500, 3), guidance=3.5, model=part)
    said, found = sigmas(result)
    u = np.array([1000, 501, 4]) / 1001
    np.testing.assert_allclose(found, [*(3 * u / (1 + 2 * u)), 0.0], atol=1e-11)
    assert said[1:] == ["Sampler: euler.", "Guidance: 3.5 (guidance of FluxGuidance, with a cfg of 1)."]
    assert "another coordinate" in sigmas(result.model_copy(update={"solver": "heun"}))[0][1]
    stochastic = result.model_copy(update={"solver": "ddim", "eta": 0.5})
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
def test_what_differs_in_comfyui_is_said(fields: dict[str, Any], note: str) -> None:
    assert any(note in line for line in sigmas(example(**fields))[0])


def test_euler_ancestral_is_ddim_with_eta() -> None:
    """What the note promises: k-diffusion's ancestral step, in sigma / alpha, is DDIM's with the same eta."""
    noise = linear()
    for s, t in ((901, 500), (500, 40)):
        high, low = (noise.sigma(i) / noise.alpha(i) for i in (s, t))
        up = 0.7 * (low**2 * (high**2 - low**2) / high**2) ** 0.5
        added = (
            0.7 * noise.sigma(t) * (1 - (noise.alpha(s) * noise.sigma(t) / noise.alpha(t) / noise.sigma(s)) ** 2) ** 0.5
        )
        assert up == pytest.approx(added / noise.alpha(t), rel=1e-12)
