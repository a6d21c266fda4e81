"""What one network evaluation costs, and the share of it that skipping each unit saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from autodiffusion_optuna.candidate import unit_indices


@dataclass(frozen=True)
class UnitCosts:
    """Cost of one evaluation.

    ``full``: with nothing skipped, in multiply-adds an image or in seconds a batch.
    ``shares``: for each unit, in execution order, the part of ``full`` saved by skipping it alone, in [0, 1].
    Multiply-adds of units add up exactly; latencies nearly.
    """

    full: float
    shares: tuple[float, ...]

    def of(self, skip: int) -> float:
        """Cost of one evaluation with the skip set ``skip``, in the unit of ``full``."""
        return self.full * (1.0 - sum(self.shares[u] for u in unit_indices(skip)))


def macs(evaluate: Callable[[], object]) -> int:
    """Multiply-adds in ``evaluate()``: convolutions, matrix products and attention; the rest counts as 0."""
    with FlopCounterMode(display=False) as counter:
        evaluate()
    return int(counter.get_total_flops()) // 2


def unit_macs(evaluate: Callable[[int], object], units: int) -> UnitCosts:
    """Counted cost; ``evaluate(skip)`` evaluates the network once on one image."""
    full = macs(lambda: evaluate(0))
    alone = [macs(lambda u=u: evaluate(1 << u)) for u in range(units)]  # type: ignore[misc]
    return UnitCosts(float(full), tuple((full - cost) / full for cost in alone))


def unit_latency(evaluate: Callable[[int], object], units: int, device: torch.device, repeats: int = 7) -> UnitCosts:
    """Measured cost; ``evaluate(skip)`` evaluates the network once on the batch whose latency matters.

    Medians over ``repeats`` rounds. A round times the full network and each unit's absence one after the
    other, and shares are taken within a round, so that a machine that slows down over minutes does not tilt
    them.
    """
    skips = (0, *(1 << u for u in range(units)))
    for skip in skips:  # the first call of a kernel pays for its choice and its memory
        evaluate(skip)
    rounds = [[seconds(evaluate, skip, device) for skip in skips] for _ in range(repeats)]
    shares = [max(statistics.median(1 - r[1 + u] / r[0] for r in rounds), 0.0) for u in range(units)]
    full = statistics.median(r[0] for r in rounds)
    whole = max(sum(shares), 1.0)  # noise can add up to more than the network takes
    return UnitCosts(full, tuple(share / whole for share in shares))


def seconds(evaluate: Callable[[int], object], skip: int, device: torch.device) -> float:
    """Wall seconds of ``evaluate(skip)``, the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    evaluate(skip)
    wait(device)
    return time.perf_counter() - start
