from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_runs import LISTS, SCHEDULE, TENSORS, difference, exact, nodes_only, run
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.solvers import (
    ADAMS_BASHFORTH,
    CAPPED,
    LIMIT,
    ORDERS,
    SOLVERS,
    Denoise,
    Solver,
    Times,
    evaluations,
    find_solver,
    query_steps,
    solver_names,
    step_of,
    times,
)
from autodiffusion_optuna.noise import Final, NoiseSchedule, cosine, edm, flow

SCHEDULES = [SCHEDULE, cosine(), flow(), edm(np.geomspace(0.002, 80.0, 1000))]
# Multistep solvers over the noise whose every state is asked for, and the order of each.
LINEAR_IN_NOISE = {"lms": 4, "plms_ab": 4, "deis_2": 2, "deis_3": 3, "dpm_solver_2": 2, "dpm_solver_3": 3}


def weights(solve: Solver, timesteps: list[Any], final: Final) -> list[np.ndarray]:
    """Weights of all noise answers at each step, newest first, by answering each query with a unit vector."""
    nodes = times(SCHEDULE, timesteps, final)
    K = nodes.steps
    units = torch.eye(K, dtype=torch.float64)
    states: list[Tensor] = []

    def denoise(x: Tensor, t: float) -> Tensor:
        i = len(states)
        states.append(x)
        return (x - nodes.sigma[i] * units[i]) / nodes.alpha[i]

    states.append(solve(denoise, torch.zeros(K, dtype=torch.float64), nodes))
    rows = []
    for i in range(K):
        step = nodes.rho[i + 1] - nodes.rho[i]
        row = (states[i + 1] / nodes.alpha[i + 1] - states[i] / nodes.alpha[i]) / step
        rows.append(row[: i + 1].flip(0).numpy())
    return rows


# The first four solvers as they were before the rest came: results that studies rest on.


def old_data(x: Tensor, x0: Tensor, n: Times, i: int) -> Tensor:
    ratio = n.sigma[i + 1] / n.sigma[i]
    return ratio * x + (n.alpha[i + 1] - ratio * n.alpha[i]) * x0


def old_noise(x: Tensor, x0: Tensor, n: Times, i: int) -> Tensor:
    return (1 / n.sigma[i]) * x + (-n.alpha[i] / n.sigma[i]) * x0


def old_by_noise(x: Tensor, noise: Tensor, n: Times, i: int) -> Tensor:
    ratio = n.alpha[i + 1] / n.alpha[i]
    return ratio * x + (n.sigma[i + 1] - ratio * n.sigma[i]) * noise


def old(solver: str, denoise: Denoise, x: Tensor, n: Times) -> Tensor:
    history: list[Tensor] = []
    previous = x
    for i, t in enumerate(n.timesteps):
        x0 = denoise(x, t)
        if solver == "dpmpp_2m":
            data = x0
            if i > 0 and not (i == n.steps - 1 and (n.steps < 10 or n.sigma[i + 1] == 0)):
                extra = (n.lam[i + 1] - n.lam[i]) / (2 * (n.lam[i] - n.lam[i - 1]))
                data = (1 + extra) * x0 + -extra * previous
            x, previous = old_data(x, data, n, i), x0
            continue
        guess = old_data(x, x0, n, i)
        history = [old_noise(x, x0, n, i), *history[:3]]
        if solver == "ddim" or (solver == "heun" and n.sigma[i + 1] == 0):
            x = guess
        elif solver == "heun" or (i == 0 and n.steps > 1):
            there = old_noise(guess, denoise(guess, n.time(i + 1)), n, i + 1)
            x = old_by_noise(x, 0.5 * history[0] + 0.5 * there, n, i)
        else:
            noise = functools.reduce(
                torch.add, (w * eps for w, eps in zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True))
            )
            x = old_by_noise(x, noise, n, i)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "plms"])
def test_the_first_solvers_keep_every_bit(solver: str, final: Final, dtype: torch.dtype) -> None:
    rng = random.Random(solver)
    x = TENSORS["x_T"].to(dtype)
    for steps in (1, 2, 5, 9, 10, 12):
        nodes = times(SCHEDULE, sorted(rng.sample(range(1000), steps), reverse=True), final)
        assert torch.equal(SOLVERS[solver](exact(), x, nodes), old(solver, exact(), x, nodes))


# Queries


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 5, 11])
def test_query_steps_are_those_of_a_real_run(solver: str, final: Final, steps: int) -> None:
    timesteps = [950 - 80 * i for i in range(steps)]
    asked, _ = run(solver, timesteps, final, TENSORS["x_T"])
    owners = [max([i for i, listed in enumerate(timesteps) if listed >= t]) for t in asked]
    assert tuple(owners) == query_steps(solver, steps, final)
    assert len(asked) == evaluations(solver, steps, final)


def test_visits() -> None:
    assert query_steps("ddim", 3, "zero") == (0, 1, 2)
    assert query_steps("dpmpp_2m", 3, "sigma_min") == (0, 1, 2)
    assert query_steps("heun", 3, "zero") == (0, 1, 1, 2, 2)
    assert query_steps("heun", 3, "sigma_min") == (0, 1, 1, 2, 2, 2)
    assert query_steps("plms", 3, "zero") == (0, 1, 1, 2)
    assert query_steps("plms", 1, "zero") == (0,)
    assert query_steps("dpmpp_2s_mid", 3, "zero") == (0, 0, 1, 1, 2)
    assert query_steps("dpmpp_2s_mid", 3, "sigma_min") == (0, 0, 1, 1, 2, 2)
    others = set(SOLVERS) - {"heun", "plms", "dpmpp_2s_mid"}
    assert {evaluations(solver, 7, final) for solver in others for final in ("zero", "sigma_min")} == {7}


def test_a_time_belongs_to_the_step_that_crosses_it() -> None:
    listed = (900, 500.5, 20)
    asked = {900: 0, 899.9: 0, 501: 0, 500.5: 1, 20.1: 1, 20: 2, 3.5: 2, 0: 2}
    assert {t: step_of(listed, t) for t in asked} == asked
    assert step_of([7], 0) == 0


def test_the_middle_is_halfway_in_lambda() -> None:
    for schedule in SCHEDULES:
        nodes = times(schedule, [999, 640.25, 640, 1, 0], "sigma_min")
        for i in range(3):
            t, alpha, sigma = nodes.middle(i)
            assert nodes.timesteps[i + 1] < t < nodes.timesteps[i]
            assert math.log(alpha / sigma) == pytest.approx((nodes.lam[i] + nodes.lam[i + 1]) / 2, abs=1e-9)
        assert nodes.middle(4) == nodes.node(4)


# What no list may break


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_step_from_index_0_to_index_0_changes_nothing(solver: str) -> None:
    timesteps = [*range(990, 0, -90), 0]
    if solver in ("dpmpp_2s", "dpm_solver_2s"):
        timesteps.remove(450)  # an odd number, so that the last node stands alone
        assert len(timesteps) % 2 == 1
    states: list[Tensor] = []

    def record(x: Tensor, t: float) -> Tensor:
        states.append(x)
        # UniPC corrects the state at index 0 before the last step, by nothing where all answers are the same.
        return torch.full_like(x, 0.3) if solver.startswith("unipc") else exact()(x, t)

    result = SOLVERS[solver](record, TENSORS["x_T"], times(SCHEDULE, timesteps, "sigma_min"))
    reached = [*states, result] if "2s" in solver else nodes_only(solver, [*states, result])
    assert difference(reached[-1], reached[-2]) < 1e-14


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", SCHEDULES)
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


indices = st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True)
# Fractions that lie as close as two floats can.
close = st.lists(
    st.one_of(st.floats(0, 999), st.sampled_from([0.0, 5e-324, 1e-300, 500.0, math.nextafter(500, 0), 998.9999999999])),
    min_size=1,
    max_size=12,
    unique=True,
)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@settings(deadline=None, max_examples=60, derandomize=True)
@given(listed=st.one_of(indices, close), final=st.sampled_from(["zero", "sigma_min"]))
def test_no_list_gives_nan(solver: str, listed: list[float], final: Final) -> None:
    nodes = times(SCHEDULE, sorted(listed, reverse=True), final)
    x = TENSORS["x_T"][:4].float()
    for denoise in (exact(), lambda x, t: torch.sin(40 * x + t)):
        assert SOLVERS[solver](denoise, x, nodes).isfinite().all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(listed=indices, changed=st.integers(0, 999), final=st.sampled_from(["zero", "sigma_min"]))
def test_what_is_asked_alike_is_answered_alike(listed: list[int], changed: int, final: Final) -> None:
    """States depend on the times asked so far and the number of steps alone, which prefix cache rests on."""
    first = sorted(listed, reverse=True)
    if changed in first:
        return
    second = sorted([*first[:-1], changed], reverse=True)
    for solver in SOLVERS:
        (asked, states), (other_asked, other_states) = (
            run(solver, timesteps, final, TENSORS["x_T"][:4]) for timesteps in (first, second)
        )
        for t, state, other_t, other in zip(asked, states[:-1], other_asked, other_states[:-1], strict=True):
            if t != other_t:
                break
            assert torch.equal(state, other)


# Weights


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", sorted(LINEAR_IN_NOISE))
def test_weights_sum_to_1_and_reach_back_as_far_as_the_order(solver: str, final: Final) -> None:
    rows = weights(SOLVERS[solver], LISTS["K10"], final)
    assert [row.sum() for row in rows] == pytest.approx([1.0] * 10, abs=1e-8)
    reach = max(int((abs(row) > 1e-6).sum()) for row in rows)
    assert reach == LINEAR_IN_NOISE[solver]


def test_even_timesteps_give_the_published_weights() -> None:
    for solve in (find_solver("plms_ab", cap=math.inf), find_solver("plms_ab")):
        rows = weights(solve, list(range(900, 0, -100)), "sigma_min")
        for i, row in enumerate(rows):
            known = ADAMS_BASHFORTH[min(i, 3)]
            np.testing.assert_allclose(row[: len(known)], known, atol=1e-9)


def test_uneven_timesteps_give_large_weights() -> None:
    row = weights(find_solver("plms_ab", cap=math.inf), LISTS["K10"], "sigma_min")[4]
    np.testing.assert_allclose(row[:4], [13.4724, -14.2460, 4.7658, -2.9921], atol=1e-4)


def test_lms_integrates_cubics_in_rho_exactly() -> None:
    nodes = times(SCHEDULE, LISTS["K6"], "zero")
    rho = np.array(nodes.rho)
    for i, row in enumerate(weights(SOLVERS["lms"], LISTS["K6"], "zero")):
        for power in range(min(i, 3) + 1):
            mean = (rho[i + 1] ** (power + 1) - rho[i] ** (power + 1)) / (power + 1) / (rho[i + 1] - rho[i])
            scale = rho[i - min(i, 3)] ** power
            assert row @ rho[i::-1] ** power == pytest.approx(mean, rel=1e-8, abs=1e-8 * scale)


@pytest.mark.parametrize("solver", sorted(CAPPED))
@pytest.mark.parametrize("cap", [1.0, 2.5, 8.0])
@settings(deadline=None, max_examples=40, derandomize=True)
@given(listed=indices, final=st.sampled_from(["zero", "sigma_min"]))
def test_a_cap_is_kept(solver: str, cap: float, listed: list[int], final: Final) -> None:
    timesteps = sorted(set(listed) - {0}, reverse=True) or [1]
    for row in weights(find_solver(solver, cap=cap), timesteps, final):
        assert abs(row).sum() <= cap * (1 + 1e-5)


def test_a_cap_lowers_the_order_and_no_more_than_it_must() -> None:
    capped, free = (weights(find_solver("plms_ab", cap=cap), LISTS["K10"], "sigma_min") for cap in (8.0, math.inf))
    changed = 0
    for row, other in zip(capped, free, strict=True):
        if abs(other).sum() <= 8:
            np.testing.assert_allclose(row, other, atol=1e-9)
        else:
            changed += 1
            assert (abs(row) > 1e-6).sum() < (abs(other) > 1e-6).sum()
    assert 0 < changed < 9


@pytest.mark.parametrize(("end", "expected"), [(581, [4.4875, -3.4875]), (579, [1.0, 0.0])])
def test_plms_ab_is_capped_at_8(end: int, expected: list[float]) -> None:
    # Over steps of 40 and 40 r, the weights' magnitudes sum to 1 + r: just below 8, and just above.
    row = weights(SOLVERS["plms_ab"], [900, 860, end], "sigma_min")[1]
    np.testing.assert_allclose(row, expected, atol=1e-9)


def test_no_row_exceeds_the_limit() -> None:
    timesteps = [999, 998.999999, 998.999998, 1]
    rows = weights(find_solver("lms", cap=math.inf), timesteps, "zero")
    assert max(abs(row).sum() for row in rows) <= LIMIT
    assert rows[-1].sum() == pytest.approx(1, abs=1e-3)


# Noise


def test_ddim_with_eta_equals_its_equation() -> None:
    """Equations 12 and 16 of arXiv 2010.02502, whose alpha is our alpha squared."""
    eta, x = 0.6, TENSORS["x_T"]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((10, *x.shape)))
    for final in ("zero", "sigma_min"):
        nodes = times(SCHEDULE, LISTS["K10"], final)
        expected = x
        for i, t in enumerate(nodes.timesteps):
            here, there = nodes.alpha[i] ** 2, nodes.alpha[i + 1] ** 2
            x0 = exact()(expected, t)
            eps = (expected - here**0.5 * x0) / (1 - here) ** 0.5
            spread = eta * math.sqrt((1 - there) / (1 - here)) * math.sqrt(1 - here / there)
            expected = there**0.5 * x0 + math.sqrt(1 - there - spread**2) * eps + spread * noise[i]
        solver = find_solver("ddim", eta=eta, noise=lambda i: noise[i])
        assert difference(solver(exact(), x, nodes), expected) < 1e-12


def test_noise_is_asked_for_where_it_is_added() -> None:
    steps: list[int] = []

    def noise(i: int) -> Tensor:
        steps.append(i)
        return torch.zeros(64, 2, dtype=torch.float64)

    solver = find_solver("ddim", eta=1.0, noise=noise)
    solver(exact(), TENSORS["x_T"], times(SCHEDULE, [900, 400, 0], "zero"))
    solver(exact(), TENSORS["x_T"], times(SCHEDULE, [900, 400, 0], "sigma_min"))
    assert steps == [0, 1, 0, 1]


# Names


def test_families_and_orders() -> None:
    assert {name for orders in ORDERS.values() for name in orders.values()} <= set(SOLVERS)
    assert solver_names("deis", 3) == "deis_3"
    assert solver_names("deis", None) == "deis_2"
    assert solver_names("dpmpp", 3) == "dpmpp_3m"
    assert {name: solver_names(name, None) for name in SOLVERS} == {name: name for name in SOLVERS}
    for name in SOLVERS:
        assert find_solver(name) is SOLVERS[name]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solver_names("dimm", None), r"unknown solver 'dimm'; did you mean 'ddim'\?"),
        (lambda: solver_names("unpic", 2), r"unknown solver 'unpic'; did you mean 'unipc'\?"),
        (lambda: solver_names("deis", 4), "solver 'deis' has no order 4; choose from 2, 3"),
        (lambda: solver_names("heun", 2), "solver 'heun' takes no order, got 2; leave it out or name one of deis, "),
        (lambda: find_solver("dimm"), r"unknown solver 'dimm'; did you mean 'ddim'"),
        (lambda: find_solver("heun", eta=0.5), "solver 'heun' adds no noise, got eta = 0.5"),
        (lambda: find_solver("ddim", eta=0.5), "eta = 0.5 needs noise"),
        (lambda: find_solver("ddim", eta=1.5), r"eta must lie in \[0, 1\], got 1.5"),
        (lambda: find_solver("ddim", eta=math.nan), r"eta must lie in \[0, 1\], got nan"),
        (lambda: find_solver("ddim", cap=8), "solver 'ddim' has no cap, got 8; leave it out or use one of deis_2, "),
        (lambda: find_solver("lms", cap=0.5), "cap must be at least 1, .* got 0.5"),
        (lambda: find_solver("lms", cap=math.nan), "cap must be at least 1, .* got nan"),
        (lambda: query_steps("nothing", 4, "zero"), "unknown solver"),
        (lambda: evaluations("nothing", 4, "zero"), "unknown solver"),
        (lambda: times(SCHEDULE, [1000, 5], "zero"), r"must lie in \[0, 999\], got 1000 to 5"),
        (lambda: times(SCHEDULE, [], "zero"), "strictly descending"),
        (lambda: times(SCHEDULE, [5, 5], "zero"), "strictly descending"),
        (lambda: times(SCHEDULE, [5, 9], "zero"), "strictly descending"),
        (lambda: times(SCHEDULE, [5], "one"), "unknown final 'one'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
