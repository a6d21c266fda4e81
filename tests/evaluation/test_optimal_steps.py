from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from load_source import load_source
from tiny_models import write_dit
from torch import Tensor

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.drawing import ImageSampler
from autodiffusion_optuna.evaluation.models.base import Model
from autodiffusion_optuna.evaluation.optimal_steps import gits, optimal_steps
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.solvers import ddim, times
from autodiffusion_optuna.evaluation.teacher import Teacher, run_teacher
from autodiffusion_optuna.noise import NoiseSchedule, flow, linear


@pytest.fixture(scope="module")
def mixture() -> ImageSampler:
    return ImageSampler(load_source("mixture"), Sampling(), batch=8)


def of_gaussian(schedule: NoiseSchedule, std: float = 0.5) -> ImageSampler:
    """A model of Gaussian data around 0.3, whose expected clean image is linear in the state."""

    def denoise(x: Tensor, t: float, skip: int) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * std**2 / ((alpha * std) ** 2 + sigma**2)
        return 0.3 + gain * (x - alpha * 0.3)

    model = Model("gaussian", "", (1, 2, 2), schedule, denoise, torch.device("cpu"))
    return ImageSampler(model, Sampling(), batch=8)


def replayed(sampler: ImageSampler, teacher: Teacher, timesteps: tuple[int, ...]) -> float:
    """Mean squared distance of the end of a DDIM run to the teacher's."""
    denoise = sampler.denoiser(sampler.sampling, 0, teacher.count)
    nodes = times(sampler.model.schedule, timesteps, sampler.sampling.final)
    end = ddim(lambda x, t: denoise(x, t, 0), sampler.noise(0, teacher.count), nodes)
    return float((end - teacher.end).square().mean())


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", [linear(), flow(shift=3.0)], ids=["noise", "flow"])
def test_the_error_of_a_list_is_that_of_its_run(schedule: NoiseSchedule, final: str) -> None:
    sampler = replace(of_gaussian(schedule), sampling=Sampling(final=final))  # type: ignore[arg-type]
    teacher = run_teacher(sampler, 6, points=13)
    found = optimal_steps(sampler, teacher, 2, 5)
    assert list(found.lists) == [2, 3, 4, 5]
    for steps, timesteps in found.lists.items():
        assert len(timesteps) == steps
        assert found.errors[steps] == pytest.approx(replayed(sampler, teacher, timesteps), rel=1e-4)


def test_one_run_gives_what_a_run_for_each_number_of_steps_gives(mixture: ImageSampler) -> None:
    teacher = run_teacher(mixture, 12, points=13)
    whole = optimal_steps(mixture, teacher, 1, 6)
    for steps in range(1, 7):
        alone = optimal_steps(mixture, teacher, steps, steps)
        assert alone.lists == {steps: whole.lists[steps]}
        assert alone.errors[steps] == pytest.approx(whole.errors[steps])
        assert alone.evaluations == 12 * steps * (13 - steps + 1)
    assert whole.evaluations == 12 * sum(13 - step for step in range(6))


def test_it_is_among_the_best_tenth_of_all_lists_of_the_grid(mixture: ImageSampler) -> None:
    teacher = run_teacher(mixture, 12, points=9)
    errors = sorted(replayed(mixture, teacher, timesteps) for timesteps in combinations(teacher.timesteps, 3))
    found = optimal_steps(mixture, teacher, 3, 3).errors[3]
    assert found < float(np.quantile(errors, 0.1))


def test_as_many_steps_as_points_are_the_teacher(mixture: ImageSampler) -> None:
    teacher = run_teacher(mixture, 4, points=5)
    assert optimal_steps(mixture, teacher, 5, 5).lists == {5: teacher.timesteps}
    assert optimal_steps(mixture, teacher, 5, 5).errors[5] == pytest.approx(0, abs=1e-12)
    assert gits(mixture, teacher, 5, 5) == {5: teacher.timesteps}
    for steps in (0, 6):
        with pytest.raises(ConfigError, match="give 1 to 5"):
            optimal_steps(mixture, teacher, steps, max(steps, 5))


def test_the_batch_changes_no_list(mixture: ImageSampler) -> None:
    found = []
    for batch in (1, 5, 64):
        sampler = replace(mixture, batch=batch)
        found.append(optimal_steps(sampler, run_teacher(sampler, 12, points=11), 1, 4).lists)
    assert found[0] == found[1] == found[2]


def test_gits_is_the_cheapest_of_all_lists_that_begin_at_the_first_point(mixture: ImageSampler) -> None:
    teacher = run_teacher(mixture, 6, points=8)
    grid = teacher.timesteps
    ends = dict(zip(grid, teacher.states, strict=True))

    def cost(timesteps: tuple[int, ...]) -> float:
        total, nodes = 0.0, times(mixture.model.schedule, timesteps, "zero")
        for i, t in enumerate(timesteps):
            here, there = nodes.node(i), nodes.node(i + 1)
            x0, ratio = teacher.denoised[grid.index(t)], there.sigma / here.sigma
            moved = ratio * ends[t] + (there.alpha - ratio * here.alpha) * x0
            wanted = ends[timesteps[i + 1]] if i + 1 < len(timesteps) else teacher.end
            total += float((moved - wanted).flatten(1).norm(dim=1).mean())
        return total

    found = gits(mixture, teacher, 1, 4)
    assert found[1] == (999,)
    for steps in (2, 3, 4):
        every = [(grid[0], *rest) for rest in combinations(grid[1:], steps - 1)]
        assert cost(found[steps]) == pytest.approx(min(map(cost, every)), rel=1e-5)


def test_latents_labels_and_guidance_are_the_samplers(tmp_path: Path) -> None:
    write_dit(tmp_path)
    model = load_source(str(tmp_path))
    found = {}
    for guidance in (1.0, 6.0):
        sampler = ImageSampler(model, Sampling(guidance=guidance), batch=4)
        teacher = run_teacher(sampler, 6, points=7)
        assert torch.equal(sampler.model.to_images(teacher.end), sampler.sample(Candidate(teacher.timesteps), 0, 6))
        found[guidance] = optimal_steps(sampler, teacher, 3, 3)
        assert found[guidance].errors[3] == pytest.approx(
            replayed(sampler, teacher, found[guidance].lists[3]), rel=1e-3
        )
    assert found[1.0].errors[3] != pytest.approx(found[6.0].errors[3], rel=0.01)
