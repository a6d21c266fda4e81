"""Teachers: fine runs of the model, whose states and images cheaper runs of the same noise are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.drawing import ImageSampler
from autodiffusion_optuna.evaluation.solvers import SOLVERS, ddim, times

POINTS = 25
"""Steps of a teacher of the first order, at least."""
FINE = "dpmpp_2m"
"""Solver of a teacher of which the images alone are kept."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A run of DDIM over a fine grid, on the first images of the search bank.

    ``timesteps``: the grid's points, strictly descending. ``states``, ``denoised``: float32 [points, n, C, H, W] on the
    CPU, the state at each point and the clean image predicted there. ``end``: float32 [n, C, H, W] on the CPU, where
    the run ends. ``evaluations``: of the network, counted by image.
    """

    timesteps: tuple[int, ...]
    states: Tensor
    denoised: Tensor
    end: Tensor
    evaluations: int

    @property
    def count(self) -> int:
        """Images of the teacher."""
        return len(self.end)


def teacher_grid(T: int, points: int) -> tuple[int, ...]:
    """``points`` evenly spread indices from T - 1 to 0, all of them where there are no more; strictly descending."""
    if points < 2:
        raise ConfigError(f"a teacher of {points} points has no steps; give 2 or more")
    return tuple(int(t) for t in np.linspace(T - 1, 0, min(points, T)).round())


def run_teacher(sampler: ImageSampler, count: int, points: int = POINTS) -> Teacher:
    """Run DDIM (arXiv 2010.02502, without noise) over ``points`` evenly spread steps on the sampler's first images.

    ``count``: images, from 0 of the search bank, with their labels or prompts and the sampler's guidance scale.
    ``ModelError`` where the device has too little memory for a single image.
    """
    timesteps = teacher_grid(sampler.model.schedule.T, points)
    nodes = times(sampler.model.schedule, timesteps, sampler.sampling.final)
    sampler.prepare(0, count)
    shape = (len(timesteps), count, *sampler.model.shape)
    states, denoised, end = torch.empty(shape), torch.empty(shape), torch.empty(shape[1:])

    def run(first: int, last: int) -> None:
        denoise, points = sampler.denoiser(sampler.sampling, first, last), iter(range(len(timesteps)))

        def recorded(x: Tensor, t: float) -> Tensor:
            point = next(points)
            x0 = denoise(x, t, 0)
            states[point, first:last], denoised[point, first:last] = x.cpu(), x0.cpu()
            return x0

        end[first:last] = ddim(recorded, sampler.noise(first, last), nodes).cpu()

    for _ in sampler.by_batch(run, 0, count):
        pass
    return Teacher(timesteps, states, denoised, end, len(timesteps) * count)


def teacher_images(sampler: ImageSampler, count: int, timesteps: Sequence[float]) -> Tensor | None:
    """Images uint8 [n, C, H, W] that DPM-Solver++(2M) makes with ``timesteps``; None where one is not finite.

    Of the second order: one of the first is no nearer to the model than candidates of a higher order are, unless it has
    hundreds of steps. ``count`` and errors are those of ``run_teacher``.
    """
    nodes = times(sampler.model.schedule, timesteps, sampler.sampling.final)
    sampler.prepare(0, count)

    def run(first: int, last: int) -> tuple[Tensor, bool]:
        denoise = sampler.denoiser(sampler.sampling, first, last)
        x = SOLVERS[FINE](lambda x, t: denoise(x, t, 0), sampler.noise(first, last), nodes)
        return sampler.model.to_images(x), bool(x.isfinite().all())

    images, finite = zip(*sampler.by_batch(run, 0, count), strict=True)
    return torch.cat(images) if all(finite) else None
