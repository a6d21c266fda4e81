"""Each recipe's scheduler takes the steps of our own solver, and nothing of the pipeline's own changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from example_results import example
from torch import Tensor

from autodiffusion_optuna import Result, apply
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.denoiser import PREDICTIONS
from autodiffusion_optuna.evaluation.solvers import SOLVERS, times
from autodiffusion_optuna.export.recipes import find_recipe
from autodiffusion_optuna.noise import NoiseSchedule, flow, linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:algorithm_type dpmsolver is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers, in pytest.warns
]

LISTS = {
    2: (900, 300),
    5: (990, 700, 500, 210, 7),
    6: (999, 610, 577, 210, 95, 0),
    12: (999, 901, 850, 610, 577, 400, 300, 210, 150, 95, 40, 7),
    16: (999, 901, 850, 800, 700, 610, 577, 500, 400, 300, 210, 150, 95, 40, 7, 1),
}
EPS = ("ddim", "euler", "heun", "lms", "dpm_solver_2", "dpm_solver_3", "dpm_solver_2s", "dpmpp_2s", "dpmpp_2m",
       "dpmpp_3m", "unipc_2", "unipc_3", "deis_2", "deis_3")  # fmt: skip
FLOW = ("ddim", "euler", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "deis_2", "deis_3")
NONE = ("plms", "plms_ab", "dpmpp_2s_mid", "dpmpp_3m_exact")
BY_NOISE = ("heun", "lms", "dpm_solver_2", "dpm_solver_3", "dpm_solver_2s", "deis_2", "deis_3")
"""Solvers that divide by sigma, which costs digits in diffusers' float32."""


class Loop:
    """A pipeline of the simplest kind: as DDPMPipeline, with a formula for a network."""

    def __init__(self, scheduler: Any, network: Callable[[Tensor, float], Tensor], steps: int) -> None:
        self.steps = steps
        self.scheduler = scheduler
        self.unet = type("UNet2DModel", (), {"__call__": lambda _, x, t: network(x, t)})()

    def __call__(self, x: Tensor) -> Tensor:
        self.scheduler.set_timesteps(self.steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, float(t)), t, x, generator=None).prev_sample
        return x


def formula(x: Tensor, t: float) -> Tensor:
    return torch.tanh(1.3 * x + 0.3 * torch.sin(3 * x) + t / 700)


def compare(noise: NoiseSchedule, scheduler: Any, result: Result) -> float:
    """Relative difference of the diffusers scheduler in float32 from our solver in float64."""
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = result.model.prediction
    assert prediction is not None

    def denoise(x: Tensor, t: float) -> Tensor:
        a, b = PREDICTIONS[prediction](noise.alpha(t), noise.sigma(t))
        x0 = a * x + b * formula(x, float(noise.model_times[int(t)]))
        return x0.clamp(-1, 1) if result.model.clip else x0

    wanted = SOLVERS[result.solver](denoise, x, times(noise, result.timesteps, result.final))
    got = apply(Loop(scheduler, formula, len(result.timesteps)), result)(x.float())
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", EPS)
def test_the_scheduler_takes_our_solvers_steps(solver: str, final: str) -> None:
    from diffusers import DDPMScheduler

    limit = 1e-3 if solver in BY_NOISE else 5e-6
    for steps, timesteps in LISTS.items():
        for prediction, clip in (("epsilon", False), ("v_prediction", True), ("sample", False)):
            if clip and solver in ("lms", "dpm_solver_2s"):
                clip = False
            part = {"prediction": prediction, "clip": clip}
            result = example(solver=solver, final=final, timesteps=timesteps, model=part)
            scheduler = DDPMScheduler(prediction_type=prediction, thresholding=True)
            assert compare(linear(), scheduler, result) < limit, (steps, prediction)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", FLOW)
def test_the_scheduler_takes_our_solvers_steps_on_a_flow(solver: str, final: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise = flow(1000, 3.0)
    for steps, timesteps in LISTS.items():
        part = {"prediction": "flow_prediction"}
        result = example(noise, solver=solver, final=final, timesteps=timesteps, model=part)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        assert compare(noise, scheduler, result) < (1e-3 if solver in BY_NOISE else 5e-6), steps


@pytest.mark.parametrize("solver", FLOW)
def test_a_flow_is_clipped_as_in_the_search(solver: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    part = {"prediction": "flow_prediction", "clip": True}
    result = example(flow(1000, 3.0), solver=solver, timesteps=LISTS[5], model=part)
    assert compare(flow(1000, 3.0), FlowMatchEulerDiscreteScheduler(shift=3.0), result) < 1e-4


INHERITED: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"use_lu_lambdas": True, "euler_at_final": True, "final_sigmas_type": "sigma_min"},
    "DPMSolverSinglestepScheduler": {"use_exponential_sigmas": True, "solver_order": 3},
    "UniPCMultistepScheduler": {"disable_corrector": [0, 1], "solver_type": "bh1", "use_beta_sigmas": True},
    "DEISMultistepScheduler": {"use_exponential_sigmas": True, "solver_order": 3},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True, "use_beta_sigmas": True, "shift_terminal": 0.1},
}


@pytest.mark.parametrize("name", INHERITED)
def test_nothing_of_the_pipelines_own_scheduler_changes_the_steps(name: str) -> None:
    import diffusers

    flowing = name.startswith("Flow")
    noise = flow(1000, 3.0) if flowing else linear()
    part = {"prediction": "flow_prediction"} if flowing else {}
    for solver in FLOW if flowing else EPS:
        result = example(noise, solver=solver, timesteps=LISTS[5], model=part)
        scheduler = getattr(diffusers, name)(**INHERITED[name])
        assert compare(noise, scheduler, result) < 1e-4, solver
        # A script hands the list itself to a scheduler of these options.
        recipe = find_recipe(result)
        if recipe.argument is not None:
            mine = getattr(diffusers, recipe.scheduler).from_config(scheduler.config, **recipe.options)
            given = result.timesteps if recipe.argument == "timesteps" else recipe.sigmas[:-1]
            mine.set_timesteps(**{recipe.argument: list(given)})
            np.testing.assert_allclose(mine.sigmas, recipe.sigmas, rtol=1e-4)  # a table in float32


def test_what_diffusers_cannot_do_is_refused_with_the_way_out() -> None:
    flowing = {"prediction": "flow_prediction"}
    impossible = [example(solver=solver) for solver in NONE]
    impossible += [example(flow(), solver=solver, model=flowing) for solver in {*SOLVERS} - {*FLOW}]
    impossible += [example(solver=solver, model={"clip": True}) for solver in ("lms", "dpm_solver_2s")]
    impossible += [example(eta=0.5), example(solver="deis_2", amplification_cap=4.0)]
    impossible += [
        example(solver="dpmpp_3m", final="sigma_min", timesteps=tuple(range(900, -1, -90)))
    ]  # NaN in diffusers
    for result in impossible:
        with pytest.raises(
            ConfigError, match=r"diffusers has no scheduler that takes the steps of .*adopt sample"
        ) as e:
            find_recipe(result)
        assert "\n" not in str(e.value)
