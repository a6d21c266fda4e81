from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.models.mixture import GaussianMixture
from autodiffusion_optuna.evaluation.solvers import SOLVERS, Denoise, find_solver, query_steps, times
from autodiffusion_optuna.noise import Final, NoiseSchedule, flow, linear

GOLDEN = Path(__file__).parent.parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "solvers.json").read_text())
TENSORS = load_file(GOLDEN / "solvers.safetensors")
LISTS: dict[str, list[int]] = FACTS["lists"]
SCHEDULE = linear()
MIXTURE = GaussianMixture(
    *(torch.tensor(FACTS["model"][part], dtype=torch.float64) for part in ("weights", "means", "stds"))
)
# Golden name -> solver and final.
CASES: dict[str, tuple[str, Final]] = {
    "ddim_one": ("ddim", "one"),
    "ddim_alpha0": ("ddim", "first"),
    "plms_compvis_alpha0": ("plms", "first"),
    "dpmpp_2m_alpha0": ("dpmpp_2m", "first"),
    "dpmpp_2m_one_lof0": ("dpmpp_2m", "one"),
    "heun_one": ("heun", "one"),
    "heun_alpha0": ("heun", "first"),
}


def exact(schedule: NoiseSchedule = SCHEDULE) -> Denoise:
    return lambda x, t: MIXTURE.x0(x, schedule.alpha(t), schedule.sigma(t))


def run(
    solver: str, timesteps: list[Any], final: Final, x: Tensor, schedule: NoiseSchedule = SCHEDULE
) -> tuple[list[float], list[Tensor]]:
    """Times of all queries, and the states they were made at followed by the result."""
    asked: list[float] = []
    states: list[Tensor] = []
    denoise = exact(schedule)

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        states.append(x)
        return denoise(x, t)

    result = SOLVERS[solver](record, x, times(schedule, timesteps, final))
    return asked, [*states, result]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def nodes_only(solver: str, states: list[Tensor]) -> list[Tensor]:
    """Without a solver's inner guesses: Heun's second query a step, and PLMS's second at all."""
    if solver == "heun":
        return [*states[:-1:2], states[-1]]
    return [states[0], *states[2:]] if solver == "plms" else states


def test_the_mixture_is_the_golden_one() -> None:
    for t, expected in zip(TENSORS["probe.t"].tolist(), TENSORS["probe.eps"], strict=True):
        x, alpha, sigma = TENSORS["probe.x"], SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        assert difference((x - alpha * MIXTURE.x0(x, alpha, sigma)) / sigma, expected) < 1e-12


@pytest.mark.parametrize("name", sorted(LISTS))
@pytest.mark.parametrize("final", ["one", "first"])
def test_nodes_equal_the_golden_ones(name: str, final: Final) -> None:
    nodes = times(SCHEDULE, LISTS[name], final)
    prefix = f"{name}.nodes_{'one' if final == 'one' else 'alpha0'}"
    np.testing.assert_allclose(nodes.alpha, TENSORS[f"{prefix}.alpha"], rtol=1e-13)
    np.testing.assert_allclose(nodes.sigma, TENSORS[f"{prefix}.sigma"], rtol=1e-12)
    assert nodes.lam[0] == pytest.approx(SCHEDULE.lambda_(LISTS[name][0]), rel=1e-12)
    assert math.isinf(nodes.lam[-1]) == (final == "one")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("name", sorted(LISTS))
def test_every_state_equals_the_official_code(name: str, case: str, dtype: torch.dtype, tolerance: float) -> None:
    solver, final = CASES[case]
    asked, states = run(solver, LISTS[name], final, TENSORS["x_T"].to(dtype))
    golden = next(entry for entry in FACTS["cases"] if entry["name"] == f"{name}.{case}")
    assert asked == golden["evaluation_times"]
    reached = nodes_only(solver, states)
    assert len(reached) == len(LISTS[name]) + 1
    for state, expected in zip(reached, TENSORS[f"{name}.{case}.states"], strict=True):
        assert state.dtype == dtype
        assert difference(state, expected) < tolerance


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_error_falls_with_the_order(solver: str, order: int) -> None:
    errors = []
    for steps in (64, 128, 256):
        lam = np.linspace(SCHEDULE.lambda_(999), SCHEDULE.lambda_(0), steps + 1)[1:-1]
        inner = np.interp(-lam, -SCHEDULE.lambdas, np.arange(1000))
        _, states = run(solver, [999, *inner.tolist()], "first", TENSORS["x_T"])
        errors.append(difference(states[-1], TENSORS["K10.truth_alpha0"]))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def dpm_scheduler(final: Final) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(final_sigmas_type="zero" if final == "one" else "sigma_min")


def through_diffusers(scheduler: Any, timesteps: list[int], x: Tensor) -> Tensor:
    scheduler.set_timesteps(timesteps=timesteps)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        alpha, sigma = SCHEDULE.alpha(int(t)), SCHEDULE.sigma(int(t))
        eps = (scaled - alpha * MIXTURE.x0(scaled, alpha, sigma)) / sigma
        x = scheduler.step(eps, t, x).prev_sample
    return x


# Below 10 and from 15 steps on, diffusers and the authors' code agree on when the last step is first order.
@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize("steps", [8, 20])
def test_dpmpp_2m_equals_diffusers(final: Final, steps: int) -> None:
    timesteps = list(range(1000 - 1000 // steps, 0, -(1000 // steps)))
    _, states = run("dpmpp_2m", timesteps, final, TENSORS["x_T"])
    expected = through_diffusers(dpm_scheduler(final), timesteps, TENSORS["x_T"])
    # diffusers' float32 table holds sigma(0) = 0.01 to 3e-4 only.
    assert difference(states[-1], expected) < (2e-6 if final == "one" else 1e-5)


def test_heun_equals_diffusers() -> None:
    from diffusers import HeunDiscreteScheduler

    timesteps = list(range(900, 0, -100))
    _, states = run("heun", timesteps, "one", TENSORS["x_T"])
    scheduler = HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    expected = through_diffusers(scheduler, timesteps, TENSORS["x_T"] / SCHEDULE.alpha(900))
    assert difference(states[-1], expected) < 2e-6


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize("steps", [1, 2, 5, 11])
def test_query_steps_are_those_of_a_real_run(solver: str, final: Final, steps: int) -> None:
    timesteps = [950 - 80 * i for i in range(steps)]
    asked, _ = run(solver, timesteps, final, TENSORS["x_T"])
    assert tuple(timesteps.index(int(t)) if t in timesteps else steps - 1 for t in asked) == query_steps(
        solver, steps, final
    )


def test_visits() -> None:
    assert query_steps("ddim", 3, "one") == (0, 1, 2)
    assert query_steps("dpmpp_2m", 3, "first") == (0, 1, 2)
    assert query_steps("heun", 3, "one") == (0, 1, 1, 2, 2)
    assert query_steps("heun", 3, "first") == (0, 1, 1, 2, 2, 2)
    assert query_steps("plms", 3, "one") == (0, 1, 1, 2)
    assert query_steps("plms", 1, "one") == (0,)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_step_from_index_0_to_index_0_changes_nothing(solver: str) -> None:
    timesteps = [*range(990, 0, -90), 0]
    _, states = run(solver, timesteps, "first", TENSORS["x_T"])
    reached = nodes_only(solver, states)
    assert difference(reached[-1], reached[-2]) < 1e-14


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize("schedule", [SCHEDULE, flow()])
def test_results_are_finite_and_arguments_untouched(solver: str, final: Final, schedule: NoiseSchedule) -> None:
    x = TENSORS["x_T"].float()
    before = x.clone()
    answers: list[tuple[Tensor, Tensor]] = []
    denoise = exact(schedule)

    def keep(x: Tensor, t: float) -> Tensor:
        answers.append((x0 := denoise(x, t), x0.clone()))
        return x0

    out = SOLVERS[solver](keep, x, times(schedule, [999, 700, 420, 3, 0], final))
    assert out.isfinite().all()
    assert out.dtype == torch.float32
    assert torch.equal(x, before)
    assert all(torch.equal(answer, copy) for answer, copy in answers)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown solver 'dimm'; did you mean 'ddim'"):
        find_solver("dimm")
    with pytest.raises(ConfigError, match="unknown solver"):
        query_steps("nothing", 4, "one")
    with pytest.raises(ConfigError, match=r"must lie in \[0, 999\], got 1000 to 5"):
        times(SCHEDULE, [1000, 5], "one")
    for listed in ([], [5, 5], [5, 9]):
        with pytest.raises(ConfigError, match="strictly descending"):
            times(SCHEDULE, listed, "one")
    with pytest.raises(ConfigError, match="unknown final 'zero'"):
        times(SCHEDULE, [5], "zero")  # type: ignore[arg-type]
