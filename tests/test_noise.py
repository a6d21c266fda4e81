from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from autodiffusion_optuna import noise
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.denoiser import model_time

GOLDEN = Path(__file__).parent / "golden"
VARIANCE_PRESERVING = [noise.linear(), noise.scaled_linear(), noise.cosine(), noise.linear(50, 0.002, 0.4)]


def test_linear_equals_the_golden_levels() -> None:
    expected = load_file(GOLDEN / "solvers.safetensors")["alphas_cumprod"]
    np.testing.assert_allclose(noise.linear().alphas ** 2, expected, rtol=1e-13)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear", "num_train_timesteps": 40, "beta_start": 0.0025, "beta_end": 0.5},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
)
def test_scheduler_configs_give_the_levels_diffusers_uses(config: dict[str, Any]) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**config)
    schedule = noise.from_scheduler_config(dict(scheduler.config))
    assert scheduler.config.num_train_timesteps == schedule.T
    np.testing.assert_allclose(schedule.alphas**2, scheduler.alphas_cumprod.numpy(), rtol=3e-5)


@pytest.mark.parametrize("schedule", [*VARIANCE_PRESERVING, noise.flow(), noise.edm(np.geomspace(0.002, 80, 40))])
def test_noise_grows_with_the_index(schedule: noise.NoiseSchedule) -> None:
    assert (np.diff(schedule.lambdas) < 0).all()
    assert schedule.lambda_(3) == pytest.approx(math.log(schedule.alphas[3] / schedule.sigmas[3]))


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING)
def test_fractional_times_lie_between_their_neighbours(schedule: noise.NoiseSchedule) -> None:
    assert schedule.variance_preserving
    alpha, sigma = schedule.alpha(7.25), schedule.sigma(7.25)
    expected = 0.75 * math.log(schedule.alpha(7)) + 0.25 * math.log(schedule.alpha(8))
    assert math.log(alpha) == pytest.approx(expected, rel=1e-12)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-14)


def test_between_indices_a_flow_has_the_levels_of_its_time() -> None:
    for schedule in (noise.flow(), noise.flow(10, 3.0)):
        for t in (0.5, 7.25, schedule.T - 1.3):
            s = model_time(schedule, t) / 1000
            assert (schedule.alpha(t), schedule.sigma(t)) == (
                pytest.approx(1 - s, rel=1e-9),
                pytest.approx(s, rel=1e-9),
            )


def test_between_indices_edm_has_the_level_of_its_time() -> None:
    schedule = noise.edm(np.geomspace(0.002, 80, 8) ** 1.1)
    for t in (0.5, 3.25, 6.9):
        assert schedule.alpha(t) == 1
        assert math.log(schedule.sigma(t)) / 4 == pytest.approx(model_time(schedule, t), abs=1e-12)


def test_whole_floats_are_indices() -> None:
    schedule = noise.linear()
    assert schedule.alpha(613.0) == schedule.alpha(613) == schedule.alphas[613]
    assert schedule.sigma(613.0) == schedule.sigmas[613]


def test_flow_shift_moves_towards_noise() -> None:
    plain, shifted = noise.flow(), noise.flow(shift=3.0)
    s = plain.sigmas
    np.testing.assert_allclose(shifted.sigmas, 3 * s / (1 + 2 * s), rtol=1e-14)
    np.testing.assert_allclose(shifted.alphas + shifted.sigmas, 1.0, rtol=1e-14)
    assert not plain.variance_preserving
    assert plain.sigma(10.5) == pytest.approx((s[10] + s[11]) / 2)


def test_flow_is_recognised_in_a_config() -> None:
    schedule = noise.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    np.testing.assert_array_equal(schedule.sigmas, noise.flow(1000, 3.0).sigmas)


@pytest.mark.parametrize("abar", [[], [[0.5]], [1.0, 0.5], [0.5, 0.0], [0.5, 0.5], [0.4, 0.5], [0.5, math.nan]])
def test_impossible_levels_are_refused(abar: list[float]) -> None:
    with pytest.raises(ConfigError, match="noise schedule"):
        noise.from_alphas_cumprod(np.array(abar))


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config = {**betas, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    theirs = DPMSolverMultistepScheduler(**config)
    ours = noise.from_scheduler_config(dict(theirs.config))
    np.testing.assert_allclose(ours.alphas, theirs.alphas_cumprod.double().sqrt(), rtol=2e-3, atol=2e-6)
    assert ours.alphas[-1] == 2**-12
    assert (np.diff(ours.lambdas) < 0).all()
    steep = noise.from_scheduler_config({**config, "beta_schedule": "linear", "beta_end": 0.02})
    assert 0 < steep.alphas[-1] < 2**-12
    trained = {"trained_betas": [0.1, 0.2, 0.3], "rescale_betas_zero_snr": True, "prediction_type": "sample"}
    assert noise.from_scheduler_config(trained).alphas[-1] == 2**-12


def test_unknown_betas_and_zero_snr_of_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown beta_schedule 'sigmoid'.*scaled_linear"):
        noise.from_scheduler_config({"beta_schedule": "sigmoid"})
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):
        noise.from_scheduler_config({"rescale_betas_zero_snr": True})
