"""Text for SD.Next's field of timesteps, and what that field cannot give."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers.schedulers import AysSchedules
from example_results import example

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.formats import notes_of, result_text
from autodiffusion_optuna.export.sdnext import ORDERS
from autodiffusion_optuna.noise import flow, scaled_linear

SD: dict[str, Any] = {"kind": "StableDiffusionPipeline", "guidance": "free", "shape": (4, 64, 64)}


def test_the_text_is_that_of_its_own_presets() -> None:
    ays = tuple(AysSchedules["StableDiffusionTimesteps"])
    result = example(scaled_linear(), timesteps=ays, solver="dpmpp_2m", guidance=7.5, model=SD)
    assert result_text(result, "sdnext") == "999,850,736,645,545,455,343,233,124,24\n"
    assert notes_of(result, "sdnext")[1:] == [
        'Sampler: DPM++ 2M, with "Sampler order" 2 and the option "low order" off.',
        "Guidance: 7.5.",
    ]
    masked = example(scaled_linear(), skips=(("a",), (), ()), model=SD)
    assert "cannot skip layers by step" in notes_of(masked, "sdnext")[-1]


@pytest.mark.parametrize("solver", ORDERS)
def test_its_sampler_takes_these_steps(solver: str) -> None:
    from autodiffusion_optuna.export.recipes import find_recipe

    recipe = find_recipe(example(scaled_linear(), solver=solver, model=SD))
    assert (recipe.scheduler, recipe.argument) == ("DPMSolverMultistepScheduler", "timesteps")
    assert (recipe.options["solver_order"], recipe.options["algorithm_type"]) == (ORDERS[solver], "dpmsolver++")
    assert not recipe.options["lower_order_final"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "Stable Diffusion alone, not of UNet2DModel; use adopt export --format diffusers"),
        ({"timesteps": (901, 500)}, "takes 3 timesteps or more, the result has 2"),
        ({"solver": "heun"}, "no sampler that takes the steps of heun"),
        ({"eta": 0.5}, "no sampler that takes the steps of ddim as the study does"),
        ({"final": "sigma_min"}, "no sampler that takes the steps of ddim"),
    ],
)
def test_what_it_cannot_do_is_refused(fields: dict[str, Any], expected: str) -> None:
    model = {"model": SD} if fields else {}
    with pytest.raises(ConfigError, match=expected):
        result_text(example(scaled_linear(), **fields, **model), "sdnext")
    with pytest.raises(ConfigError, match="Stable Diffusion alone"):
        result_text(example(flow(), model={**SD, "prediction": "flow_prediction"}), "sdnext")
