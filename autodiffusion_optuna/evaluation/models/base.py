"""What every loader returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.cost import CostKind, UnitCosts, check_kind, unit_latency, unit_macs
from autodiffusion_optuna.evaluation.denoiser import SkippingDenoise
from autodiffusion_optuna.noise import NoiseSchedule

if TYPE_CHECKING:
    from autodiffusion_optuna.evaluation.features import Extractor
    from autodiffusion_optuna.evaluation.reference import Reference


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen diffusion model on one device.

    ``fingerprint``: sha256 in hexadecimal over weights and configs; the same wherever the files lie, and
    without device, precision and clip. ``shape``: (C, H, W) of a state. ``denoiser``: (x, t, skip) -> x0.
    ``units``: names of the skippable units in execution order. ``reference``: statistics of the data the
    model was trained on, for an extractor; None where the model ships with none.
    """

    name: str
    fingerprint: str
    shape: tuple[int, int, int]
    schedule: NoiseSchedule
    denoiser: SkippingDenoise
    device: torch.device
    units: tuple[str, ...] = ()
    reference: Callable[[Extractor], Reference] | None = None
    _costs: dict[tuple[CostKind, int], UnitCosts] = field(default_factory=dict, repr=False)

    def costs(self, kind: CostKind = "macs", batch: int = 1) -> UnitCosts:
        """Cost of one evaluation and what each unit saves of it; found once, then kept.

        ``batch``: images an evaluation, for ``"latency"`` only. ``ConfigError`` for an unknown kind.
        """
        kind = check_kind(kind)
        batch = 1 if kind == "macs" else batch
        if (kind, batch) not in self._costs:
            x = torch.zeros(batch, *self.shape, device=self.device)

            def evaluate(skip: int) -> Tensor:
                return self.denoiser(x, self.schedule.T // 2, skip)

            units = len(self.units)
            if kind == "macs":
                self._costs[kind, batch] = unit_macs(evaluate, units)
            else:
                self._costs[kind, batch] = unit_latency(evaluate, units, self.device)
        return self._costs[kind, batch]

    def to_images(self, x: Tensor) -> Tensor:
        """uint8 [B, C, H, W] of ``x`` float [B, C, H, W]: [-1, 1] becomes [0, 255], clamped and rounded."""
        return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def find_device(device: str) -> torch.device:
    """The device of that name, or the best one for ``"auto"``. ``ModelError`` where it does not exist."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if gpus else "cpu")
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if device not in known:
        raise ModelError(f"device {device!r} does not exist here; use one of: auto, {', '.join(known)}")
    return torch.device(device)
