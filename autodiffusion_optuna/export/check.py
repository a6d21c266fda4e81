"""Whether what leaves this package draws what the search's sampler draws. Imports torch only when it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from autodiffusion_optuna.export.result import Result

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Network = Callable[[Tensor, float], Tensor]
    """Prediction of a state at a model time."""

LIMIT = 2.0
"""Largest mean difference of an image's pixels, of 255, between an export and the search's sampler."""
ROUNDED = 4e-3
"""Largest relative difference of a weight from itself in another precision: bfloat16 rounds by half of that."""

STAND_INS: tuple[Network, ...] = (
    lambda x, t: 0 * x,
    lambda x, t: x,
    lambda x, t: (1.3 * x + 0.3 * (3 * x).sin() + t / 700).tanh(),
)
"""Stand in for a network. The first two are the extremes that one nears where there is hardly any signal or noise."""


def steps_error(result: Result, scheduler: Any, scaled: bool, dtype: torch.dtype) -> float:
    """Largest difference of a diffusers scheduler from the search's sampler on ``STAND_INS``; see ``difference``.

    ``scheduler``: one that takes the result's steps. ``scaled``: whether its states are x / alpha. ``dtype``: of its
    states, as in a pipeline of that precision. Nothing but the scheduler is changed, no global random state either.
    """
    import torch

    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        return max(
            difference(_theirs(scheduler, network, start, scaled), _ours(result, network, start))
            for network in STAND_INS
        )


def difference(images: Tensor, wanted: Tensor) -> float:
    """Largest mean difference of the pixels of an image [B, ...] in [-1, 1] from another, of 255; infinite for NaN.

    States that go beyond [-1, 1] are measured by their own root mean square.
    """
    scale = max(1.0, float(wanted.float().square().mean().sqrt()))
    found = float((images.float() - wanted.float()).abs().flatten(1).mean(1).max()) * 127.5 / scale
    return found if math.isfinite(found) else math.inf


def same_weights(then: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether the weights in the sample ``then`` are the same ones ``now``, up to what half precision rounds."""
    return then.keys() <= now.keys() and all(
        math.isclose(value, now[name], rel_tol=ROUNDED, abs_tol=1e-7) for name, value in then.items()
    )


def _theirs(scheduler: Any, network: Network, start: Tensor, scaled: bool) -> Tensor:
    """What a pipeline's loop makes of the noise ``start``."""
    import torch

    noise = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(None, device="cpu")
    x = (start * scheduler.init_noise_sigma).to(start.dtype) if scaled else start
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if scaled else x
        output = network(given.float(), float(t)).to(start.dtype)
        x = scheduler.step(output, t, x, generator=noise, return_dict=False)[0]
    return x


def _ours(result: Result, network: Network, start: Tensor) -> Tensor:
    """What the search's sampler makes of it, whose states are float32 whatever the network's precision."""
    import torch

    from autodiffusion_optuna.evaluation.denoiser import Denoiser
    from autodiffusion_optuna.evaluation.sampling import Sampling
    from autodiffusion_optuna.evaluation.solvers import times

    def predict(x: Tensor, model_times: Tensor, condition: object) -> Tensor:
        return network(x, float(model_times[0])).to(start.dtype).float()

    noise = torch.Generator().manual_seed(1)
    schedule = result.noise_schedule()
    prediction = result.model.prediction or "epsilon"
    denoiser = Denoiser(predict, schedule, prediction, torch.device("cpu"), clip=result.model.clip)
    solve = Sampling(**result.sampling_settings()).find_solver(lambda _: torch.randn(start.shape, generator=noise))
    return solve(denoiser, start.float(), times(schedule, result.timesteps, result.final))
