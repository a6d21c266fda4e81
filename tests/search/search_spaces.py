"""Search spaces for the tests: one of each kind."""

from __future__ import annotations

from autodiffusion_optuna.search.space import SearchSpace


def heun_visits(steps: int) -> tuple[int, ...]:
    """A second evaluation at the next step of every update but the last."""
    return (*(k for step in range(steps - 1) for k in (step, step + 1)), steps - 1)


def units(count: int) -> tuple[str, ...]:
    return tuple(f"block.{u}" for u in range(count))


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
}
