"""A network made into ``x0 = denoiser(x, t, skip)``, whatever it predicts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.skip import Units, skipping
from autodiffusion_optuna.noise import NoiseSchedule

Network = Callable[[Tensor, Tensor], Tensor]
"""(x float32 [B, C, H, W], model times float32 [B]) -> prediction [B, C or 2C, H, W] of any float dtype."""

SkippingDenoise = Callable[[Tensor, float, int], Tensor]
"""(x float [B, C, H, W], time index t, skip set) -> expected clean image, of x's shape and dtype."""


def _from_epsilon(alpha: float, sigma: float) -> tuple[float, float]:
    return 1 / alpha, -sigma / alpha


def _from_sample(alpha: float, sigma: float) -> tuple[float, float]:
    return 0.0, 1.0


def _from_v(alpha: float, sigma: float) -> tuple[float, float]:
    power = alpha**2 + sigma**2
    return alpha / power, -sigma / power


def _from_flow(alpha: float, sigma: float) -> tuple[float, float]:
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


PREDICTIONS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "epsilon": _from_epsilon,  # eps
    "sample": _from_sample,  # x0
    "v_prediction": _from_v,  # alpha eps - sigma x0 (arXiv 2202.00512, appendix D)
    "flow_prediction": _from_flow,  # eps - x0 (arXiv 2403.03206, section 2)
}
"""Prediction type -> (alpha, sigma) -> (a, b) with x0 = a x + b prediction."""

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A frozen network on one device as ``x0 = denoiser(x, t, skip=0)``.

    ``prediction``: what the network predicts, a name of ``PREDICTIONS``. If it has twice the channels of x,
    the second half is a learned variance and is dropped.
    ``precision``: a name of ``PRECISIONS``; below float32 the network runs under autocast. Its input and all
    arithmetic on states stay float32 or the dtype of x, whichever is wider.
    ``clip``: clamp x0 to [-1, 1]. Solvers derive eps from (x, x0), so eps follows the clipped x0.
    ``units``: what a skip set refers to; ``None`` where nothing can be skipped.

    Runs in inference mode and leaves every global setting as it found it.
    ``ConfigError`` for an unknown prediction type or precision.
    """

    network: Network
    schedule: NoiseSchedule
    prediction: str
    device: torch.device
    precision: str = "float32"
    clip: bool = False
    units: Units | None = None

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConfigError(choose_from("prediction type", self.prediction, PREDICTIONS))
        if self.precision not in PRECISIONS:
            raise ConfigError(choose_from("precision", self.precision, PRECISIONS))

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: float, skip: int = 0) -> Tensor:
        """Expected clean image, of x's shape and dtype.

        ``x``: float32 or float64 [B, C, H, W] on the denoiser's device. ``t``: time index in [0, T - 1], may
        be fractional. ``skip``: bit set over ``units``. ``ModelError`` for a set that names no unit, or a
        network whose output does not fit.
        """
        prediction = self._predict(x, t, skip)
        a, b = PREDICTIONS[self.prediction](self.schedule.alpha(t), self.schedule.sigma(t))
        x0 = a * x + b * prediction
        return x0.clamp(-1.0, 1.0) if self.clip else x0

    def _predict(self, x: Tensor, t: float, skip: int) -> Tensor:
        # A fill on the device: a tensor made from a host number would have to be copied and waited for.
        model_times = torch.full((x.shape[0],), model_time(self.schedule, t), device=x.device)
        dtype = PRECISIONS[self.precision]
        reduced = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        skipped = skipping(self.units, skip) if self.units else _nothing_to_skip(skip)
        with reduced, skipped:
            prediction = self.network(x.float(), model_times)
        if prediction.shape[1] == 2 * x.shape[1]:
            prediction = prediction[:, : x.shape[1]]
        if prediction.shape != x.shape:
            raise ModelError(
                f"network output has shape {list(prediction.shape)}, expected {list(x.shape)} "
                "(or twice the channels with a learned variance)"
            )
        return prediction.to(x.dtype)


def model_time(schedule: NoiseSchedule, t: float) -> float:
    """What the network takes as its timestep at time index t, interpolated linearly between indices."""
    return float(np.interp(t, np.arange(schedule.T), schedule.model_times))


def _nothing_to_skip(skip: int) -> contextlib.AbstractContextManager[None]:
    if skip:
        raise ModelError(f"skip set {skip:#x} was given, but this model has no units that can be skipped; use 0")
    return contextlib.nullcontext()
