"""Sampling: solver, final point, guidance and noise of one run; what a candidate does not choose, the study fixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.evaluation.solvers import Solver, find_solver
from autodiffusion_optuna.noise import Final


@dataclass(frozen=True)
class Sampling:
    """How a list of timesteps is turned into a sample.

    ``solver``: a name of ``SOLVERS``. ``final``: where the last update ends. ``guidance``: scale, None for the
    model's own. ``eta``: noise that ddim adds, in [0, 1]. ``cap``: largest amplification of a multistep solver.
    Searched settings have these fields' names.
    """

    solver: str = "ddim"
    final: Final = "zero"
    guidance: float | None = None
    eta: float = 0.0
    cap: float | None = None

    def of(self, candidate: Candidate) -> Sampling:
        """These settings with what the candidate chooses in their place."""
        chosen: dict[str, Any] = dict(candidate.settings)
        return replace(self, **chosen) if chosen else self

    def find_solver(self, noise: Callable[[int], Tensor] | None = None) -> Solver:
        """The solver with its settings; ``noise``: standard normal of x's shape by step, for eta > 0.

        ``ConfigError`` where a setting is not one of this solver.
        """
        return find_solver(self.solver, eta=self.eta, noise=noise if self.eta else None, cap=self.cap)
