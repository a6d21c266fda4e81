"""A network made into ``x0 = denoiser(x, t, modes)``, whatever it predicts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.units import Branches, Units
from autodiffusion_optuna.noise import NoiseSchedule

Condition = Mapping[str, Tensor]
"""What a batch of images is conditioned on: tensors [B, ...] by the names that the network's adapter knows."""

UNCONDITIONAL: Condition = {}

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x float32 [B, C, H, W], model times float32 [B], condition) -> prediction [B, C or 2C, H, W], any float dtype."""

Gradient = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x float32 [B, C, H, W], model times float32 [B], condition) -> grad_x log p(condition | x_t), float32, x's shape."""

GuidanceKind = Literal["none", "free", "embedded", "classifier"]
"""How a guidance scale acts.

``free``: prediction = negative + scale (conditional - negative), one batch of two (arXiv 2207.12598, eq. 6); at scale 1
the negative half is not evaluated. ``embedded``: the network takes the scale as the condition ``"guidance"``.
``classifier``: eps - scale sigma grad log p(y | x_t) after clipping (arXiv 2105.05233, algorithm 2).
"""


class UnitDenoise(Protocol):
    """(x float [B, C, H, W], time index t, modes of the units) -> expected clean image, of x's shape and dtype.

    ``branches``: where units reuse what an earlier evaluation gave, or are to keep it for a later one.
    """

    def __call__(self, x: Tensor, t: float, modes: int, branches: Branches | None = None, /) -> Tensor:
        """The images."""


PREDICTIONS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),  # eps
    "sample": lambda alpha, sigma: (0.0, 1.0),  # x0
    # alpha eps - sigma x0 (arXiv 2202.00512, appendix D)
    "v_prediction": lambda alpha, sigma: (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
    # eps - x0 (arXiv 2403.03206, section 2)
    "flow_prediction": lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
}
"""Prediction type -> (alpha, sigma) -> (a, b) with x0 = a x + b prediction."""

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A frozen network on one device as ``x0 = denoiser(x, t, modes=0)``.

    ``prediction``: what the network predicts, a name of ``PREDICTIONS``. If it has twice the channels of x,
    the second half is a learned variance and is dropped.
    ``precision``: a name of ``PRECISIONS``; below float32 the network runs under autocast. Its input and all
    arithmetic on states stay float32 or the dtype of x, whichever is wider.
    ``clip``: clamp x0 to [-1, 1]. Solvers derive eps from (x, x0), so eps follows the clipped x0. A classifier's
    guidance is added after the clip and not clipped again, as in guided-diffusion.
    ``units``: what modes refer to; ``None`` where there are none. A classifier has none.
    ``guidance``: how a scale acts; ``classifier``: the gradient that kind ``"classifier"`` needs.

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
    guidance: GuidanceKind = "none"
    classifier: Gradient | None = None

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConfigError(choose_from("prediction type", self.prediction, PREDICTIONS))
        if self.precision not in PRECISIONS:
            raise ConfigError(choose_from("precision", self.precision, PRECISIONS))
        assert (self.classifier is not None) == (self.guidance == "classifier")

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        t: float,
        modes: int = 0,
        branches: Branches | None = None,
        condition: Condition = UNCONDITIONAL,
        negative: Condition | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Expected clean image, of x's shape and dtype.

        ``x``: float32 or float64 [B, C, H, W] on the denoiser's device. ``t``: time index in [0, T - 1], may
        be fractional. ``modes``: of the ``units``, two bits each, with the ``branches`` that they reuse or keep.
        ``condition``: of the B images; ``negative``: what classifier-free guidance leads away from; ``scale``: of the
        guidance, without effect for kind ``"none"``. ``ModelError`` for modes that name no unit, or a network whose
        output does not fit.
        """
        # A fill on the device: a tensor made from a host number would have to be copied and waited for.
        model_times = torch.full((x.shape[0],), model_time(self.schedule, t), device=x.device)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        a, b = PREDICTIONS[self.prediction](alpha, sigma)
        x0 = a * x + b * self._predict(x, model_times, (modes, branches), condition, negative, scale)
        x0 = x0.clamp(-1.0, 1.0) if self.clip else x0
        if self.classifier is None or scale == 0:
            return x0
        gradient = self.classifier(x.float(), model_times, condition).to(x.dtype)
        return x0 + (scale * sigma**2 / alpha) * gradient  # eps - scale sigma gradient, as x0

    def _predict(
        self,
        x: Tensor,
        model_times: Tensor,
        units: tuple[int, Branches | None],
        condition: Condition,
        negative: Condition | None,
        scale: float,
    ) -> Tensor:
        if self.guidance == "embedded":
            condition = {**condition, "guidance": torch.full_like(model_times, scale)}
        if self.guidance != "free" or scale == 1:
            return self._run(x, model_times, units, condition)
        assert negative is not None, "classifier-free guidance needs a negative condition"
        both = {name: torch.cat([negative[name], tensor]) for name, tensor in condition.items()}
        away, towards = self._run(torch.cat([x, x]), model_times.repeat(2), units, both).chunk(2)
        return away + scale * (towards - away)

    def _run(self, x: Tensor, model_times: Tensor, units: tuple[int, Branches | None], condition: Condition) -> Tensor:
        """The network's prediction in x's shape and dtype, with its units in modes, and branches."""
        if units[0] and not self.units:
            raise ModelError(f"modes {units[0]:#x} were given, but this model has no units that can rest; use 0")
        dtype = PRECISIONS[self.precision]
        reduced = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        with reduced, self.units.in_modes(*units) if self.units else contextlib.nullcontext():
            prediction = self.network(x.float(), model_times, condition)
        if prediction.shape[1] == 2 * x.shape[1]:
            prediction = prediction[:, : x.shape[1]]
        if prediction.shape != x.shape:
            raise ModelError(
                f"network output has shape {list(prediction.shape)}, expected {list(x.shape)} "
                "(or twice the channels with a learned variance)"
            )
        return prediction.to(x.dtype)


def store_reduced(network: nn.Module, precision: str) -> None:
    """Keep the weights of matrix products and convolutions in ``precision``, in place.

    Autocast would round them to it at every evaluation anyway, so predictions under it are the same bit for bit, as
    long as the network does not read a weight's dtype (diffusers reads its first parameter's: loaders leave the first
    module out). It halves the memory of large networks. Norms, embeddings and biases stay float32.
    """
    dtype = PRECISIONS[precision]
    for module in network.modules():
        if dtype != torch.float32 and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.weight.data = module.weight.data.to(dtype)


SAMPLED = 12
"""Matrices, and as many vectors, that distinguish networks."""


def weights_sample(network: nn.Module) -> dict[str, float]:
    """One element each of ``SAMPLED`` matrices and kernels and ``SAMPLED`` norms and biases of a network, by name.

    They are spread evenly over those with names in order. Shows, all but surely, whether two networks in memory have
    the same weights, in whatever precisions.
    """
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, weight in sorted(network.named_parameters(), key=lambda item: item[0]):
        names[weight.ndim > 1].append(name)
    chosen = [name for kind in names.values() for name in kind[:: max(1, len(kind) // SAMPLED)][:SAMPLED]]
    return weights_of(network, chosen)


def weights_of(network: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """The middle elements of the weights of those names, without those that the network lacks or has not in memory."""
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in network.named_parameters()}
    found = {name: weights[name] for name in names if name in weights and not weights[name].is_meta}
    return {name: float(weight.detach().flatten()[weight.numel() // 2]) for name, weight in found.items()}


def model_time(schedule: NoiseSchedule, t: float) -> float:
    """What the network takes as its timestep at time index t, interpolated linearly between indices."""
    return float(np.interp(t, np.arange(schedule.T), schedule.model_times))
