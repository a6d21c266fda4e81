"""Orders of the solvers, against the exact solution of the probability-flow ODE of a mixture of Gaussians."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from solver_runs import SCHEDULE, TENSORS, difference, run

from autodiffusion_optuna.evaluation.solvers import SOLVERS, Solver, find_solver

# The last slope between 64, 128 and 256 steps. Theory has whole numbers; a solver of higher order starts with one
# step of first order, and the published third order lacks half of its second difference. The corrector adds one
# to UniPC's orders until its last, first-order step shows.
ORDER = {
    "ddim": 1.0, "euler": 1.0, "heun": 2.0, "lms": 3.85, "plms": 2.0, "plms_ab": 2.0,
    "dpm_solver_2": 2.0, "dpm_solver_3": 2.05, "dpm_solver_2s": 2.0,
    "dpmpp_2s": 1.95, "dpmpp_2s_mid": 2.0, "dpmpp_2m": 2.0, "dpmpp_3m": 2.1, "dpmpp_3m_exact": 3.0,
    "unipc_2": 2.9, "unipc_3": 2.5, "deis_2": 2.0, "deis_3": 3.05,
}  # fmt: skip


def even_in_lambda(steps: int) -> list[float]:
    return by_lambda(np.arange(steps) / steps)


def alternating_in_lambda(steps: int) -> list[float]:
    """Steps of lengths 3, 1, 3, 1, …"""
    return by_lambda(np.concatenate([[0], np.cumsum(np.tile([3.0, 1.0], steps // 2))[:-1]]) / (2 * steps))


def alternating_in_time(steps: int) -> list[float]:
    share = np.concatenate([[0], np.cumsum(np.tile([3.0, 1.0], steps // 2))[:-1]]) / (2 * steps)
    listed: list[float] = (999 * (1 - share)).tolist()
    return listed


def by_lambda(share: np.ndarray) -> list[float]:
    """Times at shares of the way in lambda from index 999 to 0, the first being 0."""
    lam = SCHEDULE.lambda_(999) + share * (SCHEDULE.lambda_(0) - SCHEDULE.lambda_(999))
    inner: list[float] = np.interp(-lam[1:], -SCHEDULE.lambdas, np.arange(1000)).tolist()
    return [999, *inner]


def error(solver: str | Solver, timesteps: list[float]) -> float:
    _, states = run(solver, timesteps, "sigma_min", TENSORS["x_T"])
    return difference(states[-1], TENSORS["K10.truth_alpha0"])


def slopes(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def test_every_solver_has_an_order() -> None:
    assert set(ORDER) == set(SOLVERS)


@pytest.mark.parametrize("solver", sorted(ORDER))
def test_error_falls_with_the_order(solver: str) -> None:
    errors = [error(solver, even_in_lambda(steps)) for steps in (64, 128, 256)]
    assert slopes(errors)[-1] == pytest.approx(ORDER[solver], abs=0.12)


@pytest.mark.parametrize("solver", sorted(set(ORDER) - {"plms", "plms_ab", "unipc_3"}))
def test_the_order_survives_uneven_steps(solver: str) -> None:
    errors = [error(solver, alternating_in_lambda(steps)) for steps in (64, 128, 256)]
    assert slopes(errors)[-1] == pytest.approx(ORDER[solver], abs=0.15)


def test_unipc_3_beats_every_second_order() -> None:
    for listed in (even_in_lambda, alternating_in_lambda):
        assert min(slopes([error("unipc_3", listed(steps)) for steps in (32, 64, 128)])) > 3.2
        assert error("unipc_3", listed(64)) < min(error(name, listed(64)) for name in ("unipc_2", "dpmpp_2m", "heun"))


def test_published_plms_weights_fall_to_first_order_on_uneven_steps() -> None:
    published = [error("plms", alternating_in_time(steps)) for steps in (24, 48, 96)]
    assert all(0.7 < slope < 1.1 for slope in slopes(published))
    assert published[0] > error("ddim", alternating_in_time(24))
    for cap in (8.0, math.inf):
        true = [error(find_solver("plms_ab", cap=cap), alternating_in_time(steps)) for steps in (24, 48, 96)]
        assert min(slopes(true)) > 1.8
        assert true[0] < published[0] / 4


def test_the_published_third_order_is_better_at_few_steps_and_the_exact_one_at_many() -> None:
    few, many = even_in_lambda(12), even_in_lambda(128)
    assert error("dpmpp_3m", few) < error("dpmpp_3m_exact", few)
    assert error("dpmpp_3m", many) > 2 * error("dpmpp_3m_exact", many)
