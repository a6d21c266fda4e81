"""What the tests of the solvers share: the golden facts, the model they were made with, and recorded runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from autodiffusion_optuna.evaluation.models.mixture import GaussianMixture
from autodiffusion_optuna.evaluation.solvers import SOLVERS, Denoise, Solver, times
from autodiffusion_optuna.noise import Final, NoiseSchedule, linear

GOLDEN = Path(__file__).parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "solvers.json").read_text())
TENSORS = load_file(GOLDEN / "solvers.safetensors")
LISTS: dict[str, list[int]] = FACTS["lists"]
SCHEDULE = linear()
MIXTURE = GaussianMixture(
    *(torch.tensor(FACTS["model"][part], dtype=torch.float64) for part in ("weights", "means", "stds"))
)


def exact(schedule: NoiseSchedule = SCHEDULE) -> Denoise:
    return lambda x, t: MIXTURE.x0(x, schedule.alpha(t), schedule.sigma(t))


def run(
    solver: str | Solver, timesteps: list[Any], final: Final, x: Tensor, schedule: NoiseSchedule = SCHEDULE
) -> tuple[list[float], list[Tensor]]:
    """Times of all queries, and the states they were made at followed by the result."""
    asked: list[float] = []
    states: list[Tensor] = []
    denoise = exact(schedule)

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        states.append(x)
        return denoise(x, t)

    solve = SOLVERS[solver] if isinstance(solver, str) else solver
    result = solve(record, x, times(schedule, timesteps, final))
    return asked, [*states, result]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def nodes_only(solver: str, states: list[Tensor]) -> list[Tensor]:
    """States at the nodes: without a solver's inner guesses."""
    if solver in ("heun", "dpmpp_2s", "dpm_solver_2s", "dpmpp_2s_mid"):
        return [*states[:-1:2], states[-1]]
    return [states[0], *states[2:]] if solver == "plms" else states
