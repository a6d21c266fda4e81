"""Images of a result by the search's own sampler; exported scripts that cannot use diffusers import this."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.prefix_cache import cached_denoise
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.solvers import times
from autodiffusion_optuna.export.result import Result


def draw(result: Result, model: Model, images: int, chosen: Sequence[int] | None = None, seed: int = 0) -> Tensor:
    """uint8 [images, C, H, W] in one batch, on the CPU, from the noise that diffusers' pipelines draw for a seed.

    ``chosen``: index of each image's label or prompt; None takes them in turn. ``ConfigError`` where the result does
    not fit the model.
    """
    candidate = result.candidate(model.units, T=model.schedule.T)
    sampling = Sampling(**result.sampling_settings())
    generator = torch.Generator().manual_seed(seed)

    def noise(step: int) -> Tensor:
        return torch.randn(images, *model.shape, generator=generator).to(model.device)

    x = noise(0)
    if chosen is None:
        chosen = [i % model.conditions.count for i in range(images)] if model.conditions else []
    denoise = cached_denoise(model.bind(chosen, sampling.guidance), candidate)
    nodes = times(model.schedule, candidate.timesteps, sampling.final)
    return model.to_images(sampling.find_solver(noise)(denoise, x, nodes)).cpu()
