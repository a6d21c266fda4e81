"""Search spaces for the tests: one of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autodiffusion_optuna.candidate import Value
from autodiffusion_optuna.search.space import SearchSpace


def heun_visits(steps: int, settings: Mapping[str, Value]) -> tuple[int, ...]:
    """A second evaluation at the next step of every update but the last."""
    return (*(k for step in range(steps - 1) for k in (step, step + 1)), steps - 1)


def solver_visits(steps: int, settings: Mapping[str, Value]) -> Sequence[int]:
    """Heun's where the solver is heun, else one evaluation at each step."""
    return heun_visits(steps, settings) if settings["solver"] == "heun" else range(steps)


def units(count: int) -> tuple[str, ...]:
    return tuple(f"block.{u}" for u in range(count))


BOTH = ("skip", "reuse")
COSTS = tuple((1 + u % 3) / 100 for u in range(40))  # sums to 0.79

SPACES = {
    "fixed": SearchSpace(1000, 4, 4),
    "one step": SearchSpace(1000, 1, 1),
    "range": SearchSpace(1000, 3, 8, min_gap=5),
    "tight": SearchSpace(20, 4, 7, min_gap=3),
    "skips": SearchSpace(1000, 6, 6, units=units(40), unit_costs=COSTS, max_skip=0.2),
    "no costs": SearchSpace(1000, 3, 3, units=units(5), max_skip=0.4, chunk=1),
    "budget": SearchSpace(
        1000, 4, 10, min_gap=2, units=units(40), unit_costs=COSTS, max_skip=0.2, max_cost=6.5, chunk=8
    ),
    "only with skips": SearchSpace(100, 6, 6, units=units(40), unit_costs=COSTS, max_skip=0.2, max_cost=5.4, chunk=32),
    "heun": SearchSpace(1000, 3, 6, units=units(40), unit_costs=COSTS, max_skip=0.3, max_cost=8, visits=heun_visits),
    "modes": SearchSpace(1000, 6, 6, units=units(40), modes=BOTH, unit_costs=COSTS, max_skip=0.2),
    "reuse": SearchSpace(1000, 3, 8, units=units(40), modes=("reuse",), unit_costs=COSTS, max_skip=0.5, max_cost=3.8),
    # The cheapest candidates skip all that they may at all steps: 5 evaluations of 0.64.
    "modes and a small budget": SearchSpace(
        1000, 3, 6, units=units(40), modes=BOTH, unit_costs=COSTS, reuse_costs=tuple(0.9 * cost for cost in COSTS),
        max_skip=0.3, max_cost=3.25, visits=heun_visits, chunk=8,
    ),
    "reuse and a small budget": SearchSpace(
        1000, 3, 6, units=units(40), modes=("reuse",), unit_costs=COSTS, max_skip=0.3, max_cost=3.6, visits=heun_visits
    ),
}  # fmt: skip
SOLVERS = {"solver": ("ddim", "heun", "dpmpp")}
SETTINGS = {
    "settings": SearchSpace(
        1000,
        4,
        4,
        choices={**SOLVERS, "final": ("zero", "sigma_min")},
        ranges={"guidance": (1.0, 8.0), "eta": (0.0, 0.05)}
    ),
    "one setting": SearchSpace(1000, 2, 2, choices={"order": (1.0, 2.0)}),
    "solvers": SearchSpace(1000, 3, 8, max_cost=8, visits=solver_visits, choices=SOLVERS),
    # Heun is too expensive unless nearly all that may be skipped is: 7 evaluations of at least 0.76.
    "heun with skips": SearchSpace(
        1000, 4, 4, units=units(40), unit_costs=COSTS, max_skip=0.2, max_cost=5.5, visits=solver_visits,
        choices={"solver": ("heun", "ddim")}, ranges={"guidance": (1.0, 8.0)},
    ),
    "all open": SearchSpace(
        1000, 3, 6, min_gap=5, units=units(40), unit_costs=COSTS, max_skip=0.3, max_cost=5, visits=solver_visits,
        chunk=8, choices={**SOLVERS, "final": ("zero", "sigma_min")}, ranges={"guidance": (-1.5, 7.25)},
    ),
}  # fmt: skip
SPACES |= SETTINGS
