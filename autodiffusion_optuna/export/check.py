"""Whether what leaves this package draws what the search's sampler draws. Imports torch only when it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from autodiffusion_optuna.export.schedule import Result

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LIMIT = 2.0
"""Largest mean difference of an image's pixels, of 255, between an export and the search's sampler."""

STAND_INS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda x, t: 0 * x,
    lambda x, t: x,
    lambda x, t: (1.3 * x + 0.3 * (3 * x).sin() + t / 700).tanh(),
)
"""What stands in for a network, whose prediction they give for a state at a model time.

The first two are the extremes that a network comes near to where there is hardly any signal or hardly any noise.
"""


def steps_error(schedule: Result, scheduler: Any, scaled: bool, dtype: torch.dtype) -> float:
    """Largest difference of a diffusers scheduler from the search's sampler on ``STAND_INS``; see ``difference``.

    ``scheduler``: one that takes the schedule's steps. ``scaled``: whether its states are x / alpha. ``dtype``: of its
    states, as in a pipeline of that precision. Nothing but the scheduler is changed, no global random state either.
    """
    import torch

    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    with torch.inference_mode():
        return max(
            difference(
                _drawn(schedule, scheduler, network, start, scaled, dtype), _sampled(schedule, network, start, dtype)
            )
            for network in STAND_INS
        )


def difference(images: Tensor, wanted: Tensor) -> float:
    """Largest mean difference of the pixels of an image [B, ...] in [-1, 1] from another, of 255; infinite for NaN.

    States that go beyond [-1, 1] are measured by their own root mean square.
    """
    scale = max(1.0, float(wanted.float().square().mean().sqrt()))
    found = float((images.float() - wanted.float()).abs().flatten(1).mean(1).max()) * 127.5 / scale
    return found if math.isfinite(found) else math.inf


ROUNDED = 4e-3
"""Largest relative difference of a weight from itself in another precision: bfloat16 rounds by half of that."""


def same_weights(then: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether the weights in the sample ``then`` are the same ones ``now``, up to what half precision rounds."""
    return then.keys() <= now.keys() and all(
        math.isclose(value, now[name], rel_tol=ROUNDED, abs_tol=1e-7) for name, value in then.items()
    )


def _drawn(
    schedule: Result,
    scheduler: Any,
    network: Callable[[Tensor, float], Tensor],
    start: Tensor,
    scaled: bool,
    dtype: torch.dtype,
) -> Tensor:
    """What a pipeline's loop makes of the noise ``start``."""
    import torch

    noise = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(len(schedule.timesteps), device="cpu")
    x = start.to(dtype)
    x = (x * scheduler.init_noise_sigma).to(dtype) if scaled else x
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if scaled else x
        output = network(given.float(), float(t)).to(dtype)
        x = scheduler.step(output, t, x, generator=noise, return_dict=False)[0]
    return x


def _sampled(schedule: Result, network: Callable[[Tensor, float], Tensor], start: Tensor, dtype: torch.dtype) -> Tensor:
    """What the search's sampler makes of it, whose states are float32 whatever the network's precision."""
    import torch

    from autodiffusion_optuna.evaluation.denoiser import Denoiser
    from autodiffusion_optuna.evaluation.sampling import Sampling
    from autodiffusion_optuna.evaluation.solvers import times

    def denoised(x: Tensor, model_times: Tensor, condition: object) -> Tensor:
        return network(x, float(model_times[0])).to(dtype).float()

    noise = torch.Generator().manual_seed(1)
    levels, prediction = schedule.noise_schedule(), schedule.model.prediction or "epsilon"
    denoiser = Denoiser(denoised, levels, prediction, torch.device("cpu"), clip=schedule.model.clip)
    sampling = Sampling(**schedule.sampling_settings())
    solve = sampling.find_solver(lambda step: torch.randn(start.shape, generator=noise))
    return solve(denoiser, start, times(levels, schedule.timesteps, schedule.final))
