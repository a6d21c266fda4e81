"""Agreement with the schedulers of diffusers, wherever those step rightly."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from solver_runs import SCHEDULE, TENSORS, difference
from torch import Tensor

from autodiffusion_optuna.evaluation.solvers import SOLVERS, Solver, find_solver, times
from autodiffusion_optuna.noise import Final

# Below 10 and from 15 steps on, diffusers and the authors' code agree on where the order is lowered.
EVEN = {steps: list(range(1000 - 1000 // steps, 0, -(1000 // steps))) for steps in (8, 20)}
UNEVEN = [940, 901, 850, 610, 577, 300, 210, 95]
TIMESTEPS = [*EVEN.values(), UNEVEN, UNEVEN[:-1]]
TOLERANCE = 2e-6  # of diffusers' float32


def eps(x: Tensor, t: float) -> Tensor:
    """A fixed network that is no denoiser at all: nothing but the solver makes two results agree."""
    return torch.sin(0.6 * x + t / 300) + 0.3 * torch.cos(0.5 * x.flip(1) - t / 90)


def ours(solver: str | Solver, timesteps: list[int], final: Final) -> Tensor:
    def denoise(x: Tensor, t: float) -> Tensor:
        return (x - SCHEDULE.sigma(t) * eps(x, t)) / SCHEDULE.alpha(t)

    solve = SOLVERS[solver] if isinstance(solver, str) else solver
    return solve(denoise, TENSORS["x_T"], times(SCHEDULE, timesteps, final))


def theirs(scheduler: Any, x: Tensor, **step: Any) -> Tensor:
    for i, t in enumerate(scheduler.timesteps):
        arguments = {name: value(i) for name, value in step.items()}
        x = scheduler.step(eps(scheduler.scale_model_input(x, t), float(t)), t, x, **arguments).prev_sample
    return x


def injected(scheduler: Any, timesteps: list[int], final: Final) -> Any:
    """For schedulers that take no list: theirs in place of the one they made."""
    scheduler.set_timesteps(len(timesteps))
    sigmas = [SCHEDULE.sigma(t) / SCHEDULE.alpha(t) for t in timesteps]
    end = 0.0 if final == "zero" else SCHEDULE.sigma(0) / SCHEDULE.alpha(0)
    scheduler.sigmas = torch.tensor([*sigmas, end], dtype=torch.float64)
    scheduler.timesteps = torch.tensor(timesteps)
    return scheduler


def dpm_solver(kind: str, order: int, final: Final) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        algorithm_type=kind, solver_order=order, final_sigmas_type="zero" if final == "zero" else "sigma_min"
    )


# diffusers has no noise-predicting DPM-Solver that ends at sigma = 0.
@pytest.mark.parametrize("timesteps", TIMESTEPS)
@pytest.mark.parametrize(
    ("solver", "kind", "order", "final"),
    [
        ("ddim", "dpmsolver++", 1, "zero"),
        ("ddim", "dpmsolver++", 1, "sigma_min"),
        ("ddim", "dpmsolver", 1, "sigma_min"),
        ("dpmpp_2m", "dpmsolver++", 2, "zero"),
        ("dpmpp_2m", "dpmsolver++", 2, "sigma_min"),
        ("dpmpp_3m", "dpmsolver++", 3, "sigma_min"),
        ("dpm_solver_2", "dpmsolver", 2, "sigma_min"),
        ("dpm_solver_3", "dpmsolver", 3, "sigma_min"),
    ],
)
def test_dpm_solver_multistep(solver: str, kind: str, order: int, final: Final, timesteps: list[int]) -> None:
    scheduler = dpm_solver(kind, order, final)
    scheduler.set_timesteps(timesteps=timesteps)
    expected = theirs(scheduler, TENSORS["x_T"])
    assert difference(ours(solver, timesteps, final), expected) < TOLERANCE


class Float64(ModuleType):
    """torch, with float64 in the place of float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def steep(x: Tensor, t: float) -> Tensor:
    """A network that magnifies every difference of its input several times, at each step."""
    return torch.sin(3 * x + t / 30) + 0.8 * torch.cos(2.5 * x.flip(1) - t / 40)


@pytest.mark.parametrize("timesteps", [[999, *UNEVEN[1:], 40], EVEN[20]])
@pytest.mark.parametrize(
    ("solver", "kind", "order", "final"),
    [
        ("ddim", "dpmsolver++", 1, "zero"),
        ("ddim", "dpmsolver++", 1, "sigma_min"),
        ("dpmpp_2m", "dpmsolver++", 2, "zero"),
        ("dpmpp_2m", "dpmsolver++", 2, "sigma_min"),
        ("dpmpp_3m", "dpmsolver++", 3, "zero"),
        ("dpmpp_3m", "dpmsolver++", 3, "sigma_min"),
        ("dpm_solver_2", "dpmsolver", 2, "sigma_min"),
        ("dpm_solver_3", "dpmsolver", 3, "sigma_min"),
    ],
)
def test_only_rounding_lies_between_us_and_diffusers(
    solver: str, kind: str, order: int, final: Final, timesteps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table of sigmas and its state are float32: up to 4e-4 on this network, and nothing with both in float64."""
    from diffusers.schedulers import scheduling_dpmsolver_multistep as module

    monkeypatch.setattr(f"{__name__}.eps", steep)
    lower = final == "sigma_min" and len(timesteps) < 10
    end = "zero" if final == "zero" else "sigma_min"
    scheduler = module.DPMSolverMultistepScheduler(
        algorithm_type=kind, solver_order=order, final_sigmas_type=end, lower_order_final=lower
    )
    scheduler.set_timesteps(timesteps=timesteps)
    mine = ours(solver, timesteps, final)
    assert difference(mine, theirs(scheduler, TENSORS["x_T"])) > 1e-7
    scheduler.set_timesteps(timesteps=timesteps)
    nodes = times(SCHEDULE, timesteps, final)
    scheduler.sigmas = torch.tensor(nodes.rho, dtype=torch.float64)
    monkeypatch.setattr(module, "torch", Float64("torch"))
    assert difference(mine, theirs(scheduler, TENSORS["x_T"])) < 1e-11


# By default diffusers lowers the last step but one of order 3 as well, where a list ends at sigma = 0.
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_dpm_solver_multistep_that_lowers_nothing_but_the_last_step(timesteps: list[int]) -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(solver_order=3, lower_order_final=False)
    scheduler.set_timesteps(timesteps=timesteps)
    expected = theirs(scheduler, TENSORS["x_T"])
    assert difference(ours("dpmpp_3m", timesteps, "zero"), expected) < TOLERANCE


@pytest.mark.parametrize("timesteps", TIMESTEPS)
@pytest.mark.parametrize(
    ("solver", "kind", "final"),
    [
        ("dpmpp_2s", "dpmsolver++", "zero"),
        ("dpmpp_2s", "dpmsolver++", "sigma_min"),
        ("dpm_solver_2s", "dpmsolver", "sigma_min"),
    ],
)
def test_dpm_solver_singlestep(solver: str, kind: str, final: Final, timesteps: list[int]) -> None:
    from diffusers import DPMSolverSinglestepScheduler

    scheduler = DPMSolverSinglestepScheduler(
        algorithm_type=kind,
        solver_order=2,
        lower_order_final=final == "zero" or len(timesteps) % 2 == 1,
        final_sigmas_type="zero" if final == "zero" else "sigma_min",
    )
    scheduler.set_timesteps(timesteps=timesteps)
    expected = theirs(scheduler, TENSORS["x_T"])
    assert difference(ours(solver, timesteps, final), expected) < TOLERANCE


@pytest.mark.parametrize("timesteps", TIMESTEPS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(order: int, final: Final, timesteps: list[int]) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = injected(UniPCMultistepScheduler(solver_order=order), timesteps, final)
    assert difference(ours(f"unipc_{order}", timesteps, final), theirs(scheduler, TENSORS["x_T"])) < TOLERANCE


@pytest.mark.parametrize("timesteps", TIMESTEPS)
@pytest.mark.parametrize("order", [2, 3])
def test_deis(order: int, timesteps: list[int]) -> None:
    from diffusers import DEISMultistepScheduler

    scheduler = injected(DEISMultistepScheduler(solver_order=order), timesteps, "sigma_min")
    assert difference(ours(f"deis_{order}", timesteps, "sigma_min"), theirs(scheduler, TENSORS["x_T"])) < TOLERANCE


@pytest.mark.parametrize("timesteps", TIMESTEPS)
@pytest.mark.parametrize(
    ("solver", "name"),
    [("ddim", "EulerDiscrete"), ("euler", "EulerDiscrete"), ("heun", "HeunDiscrete"), ("lms", "LMSDiscrete")],
)
def test_solvers_in_sigma(solver: str, name: str, timesteps: list[int]) -> None:
    import diffusers

    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_start=1e-4, beta_end=0.02)
    if name == "LMSDiscrete":
        injected(scheduler, timesteps, "zero")
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    expected = theirs(scheduler, TENSORS["x_T"] / SCHEDULE.alpha(timesteps[0]))
    assert difference(ours(solver, timesteps, "zero"), expected) < TOLERANCE


@pytest.mark.parametrize("timesteps", TIMESTEPS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_ddim_with_eta_1_is_the_first_order_sde_solver(final: Final, timesteps: list[int]) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((20, *TENSORS["x_T"].shape)))
    scheduler = dpm_solver("sde-dpmsolver++", 1, final)
    scheduler.set_timesteps(timesteps=timesteps)
    expected = theirs(scheduler, TENSORS["x_T"], variance_noise=lambda i: noise[i])
    solver = find_solver("ddim", eta=1.0, noise=lambda i: noise[i])
    assert difference(ours(solver, timesteps, final), expected) < TOLERANCE


@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_ddim_with_eta_1_is_ddpm(timesteps: list[int]) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=timesteps)
    shape = TENSORS["x_T"].shape

    def generator(i: int) -> torch.Generator:
        return torch.Generator().manual_seed(i)

    def noise(i: int) -> Tensor:
        return torch.randn(shape, generator=generator(i), dtype=torch.float64)

    expected = theirs(scheduler, TENSORS["x_T"], generator=generator)
    assert difference(ours(find_solver("ddim", eta=1.0, noise=noise), timesteps, "zero"), expected) < TOLERANCE


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_diffusers_ddim_on_its_own_list(eta: float) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((8, *TENSORS["x_T"].shape)))
    expected = theirs(scheduler, TENSORS["x_T"], eta=lambda i: eta, variance_noise=lambda i: noise[i])
    solver = find_solver("ddim", eta=eta, noise=lambda i: noise[i])
    assert difference(ours(solver, scheduler.timesteps.tolist(), "zero"), expected) < TOLERANCE
