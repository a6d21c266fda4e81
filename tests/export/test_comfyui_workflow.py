"""A workflow for ComfyUI is one that its /prompt accepts: its nodes, their inputs, and what is linked to what."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import example

from autodiffusion_optuna import Result
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.comfyui import SAMPLERS
from autodiffusion_optuna.export.formats import notes_of, result_text
from autodiffusion_optuna.noise import flow, scaled_linear

NODES = json.loads((Path(__file__).parent.parent / "data" / "comfyui_nodes.json").read_text())["nodes"]
LATENT = {"shape": (4, 64, 96), "image_shape": (3, 512, 768)}
SD: dict[str, Any] = {"kind": "StableDiffusionPipeline", "source": "org/sd15@main", "guidance": "free", **LATENT}
WIDE: dict[str, Any] = {"prediction": "flow_prediction", "shape": (16, 64, 64), "image_shape": (3, 512, 512)}


def workflow(result: Result) -> dict[str, Any]:
    """The nodes by class, after all that /prompt checks: classes, inputs, choices, bounds, links and an output."""
    found = json.loads(result_text(result, "comfyui-workflow"))
    assert all(isinstance(key, str) for key in found)
    for node in found.values():
        assert set(node) <= {"class_type", "inputs", "_meta"}
        wanted = NODES[node["class_type"]]["inputs"]
        assert set(node["inputs"]) == set(wanted), node["class_type"]
        for name, value in node["inputs"].items():
            check_input(found, wanted[name], value)
    assert [node["class_type"] for node in found.values()].count("SaveImage") == 1
    return found


def check_input(found: dict[str, Any], wanted: Any, value: Any) -> None:
    if isinstance(value, list):
        source, output = value
        assert NODES[found[source]["class_type"]]["outputs"][output] == wanted
    elif isinstance(wanted, list):
        assert value in wanted
    elif isinstance(wanted, dict):
        assert type(value) is {"INT": int, "FLOAT": float}[wanted["type"]]
        assert wanted["min"] <= value <= wanted["max"]
    else:
        assert type(value) is {"FILE": str, "STRING": str, "BOOLEAN": bool}[wanted]


def one(found: dict[str, Any], kind: str) -> dict[str, Any]:
    (inputs,) = (node["inputs"] for node in found.values() if node["class_type"] == kind)
    assert isinstance(inputs, dict)
    return inputs


def test_stable_diffusion_is_loaded_from_one_checkpoint() -> None:
    result = example(scaled_linear(), timesteps=(999, 613, 208), solver="dpmpp_2m", guidance=7.5, model=SD)
    found = workflow(result)
    assert one(found, "CheckpointLoaderSimple")["ckpt_name"] == "sd15.safetensors"
    assert one(found, "EmptyLatentImage") == {"width": 768, "height": 512, "batch_size": 1}
    assert one(found, "KSamplerSelect")["sampler_name"] == "dpmpp_2m"
    sample = one(found, "SamplerCustom")
    assert (sample["cfg"], sample["add_noise"]) == (7.5, True)
    positive, negative = (found[sample[name][0]]["inputs"]["text"] for name in ("positive", "negative"))
    assert positive
    assert negative == ""
    numbers = [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", one(found, "ManualSigmas")["sigmas"])]
    np.testing.assert_allclose(numbers, result.levels, rtol=1e-9, atol=1e-12)
    notes = notes_of(result, "comfyui-workflow")
    assert "ckpt_name (sd15.safetensors)" in notes[0]
    assert notes[1] == "Sampler: dpmpp_2m."


def test_flux_and_sd3_have_their_own_loaders_and_latents() -> None:
    flux = {"kind": "FluxPipeline", "source": "/models/flux1-dev.safetensors", "guidance": "embedded", **WIDE}
    found = workflow(example(flow(), timesteps=(999, 500), guidance=3.5, model=flux))
    assert one(found, "UNETLoader")["unet_name"] == "flux1-dev.safetensors"
    assert one(found, "FluxGuidance")["guidance"] == 3.5
    assert one(found, "SamplerCustom")["cfg"] == 1.0
    assert found[one(found, "SamplerCustom")["positive"][0]]["class_type"] == "FluxGuidance"
    sd3 = {"kind": "StableDiffusion3Pipeline", "source": "sd3", "guidance": "free", **WIDE}
    found = workflow(example(flow(1000, 3.0), timesteps=(999, 500), guidance=5.0, model=sd3))
    assert one(found, "EmptySD3LatentImage")["width"] == 512
    assert one(found, "CheckpointLoaderSimple")["ckpt_name"] == "sd3.safetensors"


@pytest.mark.parametrize("solver", SAMPLERS)
def test_every_sampler_that_comfyui_has_takes_no_noise_of_its_own(solver: str) -> None:
    found = workflow(example(scaled_linear(), solver=solver, guidance=5.0, model=SD))
    nodes = {node["class_type"]: node["inputs"] for node in found.values()}
    chosen = next(inputs for kind, inputs in nodes.items() if NODES[kind]["outputs"] == ["SAMPLER"])
    assert chosen.get("eta", 0.0) == 0.0
    assert not str(chosen.get("sampler_name")).endswith(("_sde", "_ancestral"))
    noisy = workflow(example(scaled_linear(), solver="ddim", eta=0.5, guidance=5.0, model=SD))
    assert one(noisy, "SamplerEulerAncestral")["eta"] == 0.5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "no loader for this model \\(UNet2DModel\\); paste the numbers of adopt export --format comfyui"),
        ({"model": SD, "solver": "plms_ab"}, "none that takes the steps of plms_ab; paste the numbers"),
        ({"model": SD, "solver": "deis_2", "amplification_cap": 4.0}, "deis_2 with an amplification cap; paste"),
        ({"model": SD, "guidance": 101.0}, "at most 100, the result has 101"),
    ],
)
def test_what_comfyui_cannot_do_is_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        result_text(example(scaled_linear(), **fields), "comfyui-workflow")
