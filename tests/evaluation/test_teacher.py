from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from load_source import load_source
from torch import Tensor

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.drawing import ImageSampler
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.evaluation.teacher import run_teacher, teacher_grid, teacher_images
from autodiffusion_optuna.search.timesteps import log_snr


@pytest.fixture(scope="module")
def sampler() -> ImageSampler:
    return ImageSampler(load_source("mixture"), Sampling(), batch=8)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_its_images_are_those_of_its_timesteps_as_a_candidate(sampler: ImageSampler, final: str) -> None:
    sampler = replace(sampler, sampling=Sampling(final=final))  # type: ignore[arg-type]
    teacher = run_teacher(sampler, 12, points=9)
    assert teacher.timesteps == (999, 874, 749, 624, 500, 375, 250, 125, 0)
    assert torch.equal(sampler.model.to_images(teacher.end), sampler.sample(Candidate(teacher.timesteps), 0, 12))
    assert teacher.evaluations == 9 * 12


def test_it_keeps_the_states_and_what_was_denoised_there(sampler: ImageSampler) -> None:
    teacher = run_teacher(sampler, 12, points=5)
    assert torch.equal(teacher.states[0], Bank(0, 0, sampler.model.shape).noise(0, 12))
    for t, state, x0 in zip(teacher.timesteps, teacher.states, teacher.denoised, strict=True):
        torch.testing.assert_close(x0, sampler.model.denoiser(state, t, 0))
    assert torch.equal(teacher.end, teacher.denoised[-1])


def test_out_of_memory_it_goes_on_with_fewer_images_at_a_time(sampler: ImageSampler) -> None:
    denoiser = sampler.model.denoiser

    def limited(most: int) -> ImageSampler:
        def denoise(x: Tensor, t: float, skip: int) -> Tensor:
            if len(x) > most:
                raise torch.OutOfMemoryError
            return denoiser(x, t, skip)

        return replace(sampler, model=replace(sampler.model, denoiser=denoise))

    whole, parts = run_teacher(sampler, 12, points=4), run_teacher(limited(3), 12, points=4)
    torch.testing.assert_close(parts.states, whole.states)
    with pytest.raises(ModelError, match="single image"):
        run_teacher(limited(0), 12, points=4)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_images_alone_are_those_of_a_second_order_solver(sampler: ImageSampler, final: str, solver: str) -> None:
    timesteps = log_snr(sampler.model.schedule, 9)
    studys = replace(sampler, sampling=Sampling(solver, final=final))  # type: ignore[arg-type]
    images = teacher_images(studys, 12, timesteps)
    assert images is not None
    fine = replace(sampler, sampling=Sampling("dpmpp_2m", final=final))  # type: ignore[arg-type]
    assert torch.equal(images, fine.sample(Candidate(timesteps), 0, 12))


def test_there_are_none_where_one_image_is_not_finite(sampler: ImageSampler) -> None:
    denoiser = sampler.model.denoiser

    def broken(x: Tensor, t: float, skip: int) -> Tensor:
        x0 = denoiser(x, t, skip).clone()
        x0[-1, 0, 0, 0] = torch.inf if t == 0 else x0[-1, 0, 0, 0]
        return x0

    assert teacher_images(replace(sampler, model=replace(sampler.model, denoiser=broken)), 12, (900, 500, 0)) is None


def test_a_grid_has_no_more_points_than_the_model_has_times() -> None:
    assert teacher_grid(4, 25) == (3, 2, 1, 0)
    with pytest.raises(ConfigError, match="2 or more"):
        teacher_grid(1000, 1)
