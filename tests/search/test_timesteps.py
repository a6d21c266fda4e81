from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodiffusion_optuna import noise
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.dmn import dmn_levels, error_bound, step_weights
from autodiffusion_optuna.search.lists import read_list
from autodiffusion_optuna.search.repair import spread
from autodiffusion_optuna.search.timesteps import AYS_SIGMAS, BASELINES, ays, baseline_timesteps, uniform_timesteps

LINEAR = noise.linear(1000)
GRIDS = {
    "linear": LINEAR,
    "cosine": noise.cosine(1000),
    "short": noise.linear(17),
    "flow": noise.flow(100),
    "edm": noise.edm(np.geomspace(0.002, 80, 64)),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_list_is_strictly_descending_at_every_length(name: str, grid: str) -> None:
    schedule = GRIDS[grid]
    for steps in {1, 2, 3, 4, 5, 7, 10, 15, schedule.T // 2, schedule.T - 1, schedule.T}:
        times = BASELINES[name](schedule, steps)
        assert len(times) == steps
        assert all(type(t) is int for t in times)
        assert all(a > b for a, b in pairwise(times))
        assert 0 <= times[-1] <= times[0] < schedule.T


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("uniform", 4, (750, 500, 250, 0)),
        ("uniform", 10, (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)),
        ("uniform-trailing", 4, (999, 749, 499, 249)),
        ("uniform-linspace", 4, (999, 666, 333, 0)),
        ("quadratic", 4, (800, 356, 89, 0)),
        ("karras", 2, (999, 0)),
        ("log-snr", 2, (999, 0)),
        ("arctan", 2, (999, 0)),
    ],
)
def test_lists_as_published(name: str, steps: int, expected: tuple[int, ...]) -> None:
    assert BASELINES[name](LINEAR, steps) == expected


def test_uniform_exists_for_every_length() -> None:
    # The published code fails for 47 of these.
    assert all(len(set(uniform_timesteps(1000, steps))) == steps for steps in range(1, 101))


def test_spaced_in_what_they_say() -> None:
    levels = -LINEAR.lambdas
    even = np.diff(levels[list(BASELINES["log-snr"](LINEAR, 10))])
    assert even.std() < 0.15 * abs(even.mean())
    rho = np.diff(np.exp(levels[list(BASELINES["karras"](LINEAR, 10))] / 7))
    assert rho.std() < 0.05 * abs(rho.mean())
    arc = np.diff(np.arctan(np.exp(levels[list(BASELINES["arctan"](LINEAR, 10))])))
    assert arc.std() < 0.05 * abs(arc.mean())


def test_the_levels_of_ays_are_those_of_the_table_that_diffusers_ships() -> None:
    from diffusers.schedulers import AysSchedules

    assert [*AYS_SIGMAS, 0.0] == AysSchedules["StableDiffusionSigmas"]
    latent = noise.scaled_linear()
    assert ays(latent, 10) == read_list("ays:sd15", latent).timesteps
    assert ays(latent, 5) == read_list("ays:sd15", latent).resampled(latent, 5).timesteps


@pytest.mark.parametrize(
    ("schedule", "suited"),
    [
        (LINEAR, True),
        (noise.scaled_linear(), True),
        (noise.flow(1000, 3.0), False),
        (noise.edm(np.geomspace(0.002, 80, 64)), False),
        (noise.linear(1000, 1e-4, 0.01), False),
    ],
    ids=["ddpm", "latent", "flow", "edm", "reaches 12"],
)
def test_ays_is_for_models_whose_noise_reaches_its_levels(schedule: noise.NoiseSchedule, suited: bool) -> None:
    assert ("ays" in baseline_timesteps(schedule, 4)) == suited


@pytest.mark.parametrize("grid", GRIDS)
def test_dmn_bounds_the_error_lower_than_even_steps_do(grid: str) -> None:
    schedule = GRIDS[grid]
    low, high = schedule.lambdas[[-1, 0]]
    for steps in (2, 3, 5, 9):
        levels = np.append(-dmn_levels(schedule, steps), high)
        assert levels[0] == pytest.approx(low)
        assert (np.diff(levels) > 0).all()
        rng = np.random.default_rng(steps)
        others = np.sort(rng.uniform(low, high, (50, steps - 1)))
        others = np.pad(others, ((0, 0), (1, 1)), constant_values=(low, high))
        even = np.linspace(low, high, steps + 1)
        assert error_bound(levels[None], schedule)[0] <= error_bound(np.vstack([others, even]), schedule).min()
        assert dmn_levels(schedule, steps) == pytest.approx(-levels[:-1])  # the same each time


def test_weights_of_a_step_integrate_every_polynomial_up_to_its_order() -> None:
    for order in (1, 2, 3):
        h = np.array([[0.7, 0.4, 0.9][-order:]])
        nodes = -np.concatenate([[0.0], np.cumsum(h[0, -2::-1])])  # of the newest images, first the one at 0
        weights = np.array([part[0] for part in step_weights(h)])
        u = np.linspace(0, h[0, -1], 20_001)
        for power in range(order):
            wanted = np.trapezoid(np.exp(u) * u**power, u)
            assert (weights * nodes**power).sum() == pytest.approx(wanted, rel=1e-6)


def test_baselines_keep_the_gap() -> None:
    lists = baseline_timesteps(LINEAR, 20, min_gap=30)
    assert list(lists) == list(BASELINES)
    assert all(a - b >= 30 for times in lists.values() for a, b in pairwise(times))


@pytest.mark.parametrize(("steps", "gap"), [(0, 1), (18, 1), (3, 9)])
def test_what_does_not_fit_is_refused(steps: int, gap: int) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        baseline_timesteps(GRIDS["short"], steps, gap)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 4))
def test_spread_is_feasible_idempotent_and_the_nearest(values: list[int], gap: int) -> None:
    wanted = sorted(values, reverse=True)
    times = spread(wanted, 31, gap)
    assert all(a - b >= gap for a, b in pairwise(times))
    assert 0 <= times[-1] <= times[0] <= 30
    assert spread(times, 31, gap) == times
    if all(a - b >= gap for a, b in pairwise(wanted)):
        assert times == tuple(wanted)


def test_spread_moves_repeats_to_free_neighbours() -> None:
    assert spread((500, 500, 400), 1000) == (500, 499, 400)
    assert spread((0, 0, 0), 1000) == (2, 1, 0)
    assert spread((999, 999, 999), 1000) == (999, 998, 997)
    assert spread((9, 8, 8), 10) == (9, 8, 7)
