"""What one network evaluation costs, and the share of it that each unit saves when it is skipped or reused."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from autodiffusion_optuna.candidate import REUSE, SKIP, unit_modes


@dataclass(frozen=True)
class UnitCosts:
    """Cost of one evaluation.

    ``full``: with all units running, in multiply-adds an image or in seconds a batch.
    ``shares``: for each unit, in execution order, the part of ``full`` saved by skipping it alone, in [0, 1];
    ``reuse_shares``: by reusing it alone, which takes an addition more. Multiply-adds of units add up exactly;
    latencies nearly.
    """

    full: float
    shares: tuple[float, ...]
    reuse_shares: tuple[float, ...]

    def of(self, modes: int) -> float:
        """Cost of one evaluation with its units in ``modes``, in the unit of ``full``."""
        saved = {SKIP: self.shares, REUSE: self.reuse_shares}
        return self.full * (1.0 - sum(saved[mode][u] for u, mode in unit_modes(modes).items()))


def macs(evaluate: Callable[[], object]) -> int:
    """Multiply-adds in ``evaluate()``: convolutions, matrix products and attention; the rest counts as 0."""
    with FlopCounterMode(display=False) as counter:
        evaluate()
    return int(counter.get_total_flops()) // 2


def unit_macs(evaluate: Callable[[int], object], units: int) -> UnitCosts:
    """Counted cost; ``evaluate(modes)`` evaluates the network once on one image. Reuse counts as skipping does."""
    full = macs(lambda: evaluate(0))
    alone = [macs(lambda u=u: evaluate(SKIP << 2 * u)) for u in range(units)]  # type: ignore[misc]
    shares = tuple((full - cost) / full for cost in alone)
    return UnitCosts(float(full), shares, shares)


def unit_latency(evaluate: Callable[[int], object], units: int, device: torch.device, repeats: int = 7) -> UnitCosts:
    """Measured cost; ``evaluate(modes)`` evaluates the network once on the batch whose latency matters.

    Medians over ``repeats`` rounds. A round times the full network and each unit skipped and reused one after the
    other, and shares are taken within a round, so that a machine that slows down over minutes does not tilt
    them.
    """
    modes = (0, *(mode << 2 * u for mode in (SKIP, REUSE) for u in range(units)))
    for at_step in modes:  # the first call of a kernel pays for its choice and its memory
        evaluate(at_step)
    rounds = [[seconds(evaluate, at_step, device) for at_step in modes] for _ in range(repeats)]
    saved = [max(statistics.median(1 - r[1 + i] / r[0] for r in rounds), 0.0) for i in range(2 * units)]
    skip, reuse = saved[:units], saved[units:]
    full = statistics.median(r[0] for r in rounds)
    # Reusing a unit is skipping it and something more: where noise has it save more, both take the mean of the two.
    pairs = [(s, r) if r <= s else ((s + r) / 2,) * 2 for s, r in zip(skip, reuse, strict=True)]
    whole = max(sum(s for s, _ in pairs), 1.0)  # noise can add up to more than the network takes
    return UnitCosts(full, tuple(s / whole for s, _ in pairs), tuple(r / whole for _, r in pairs))


def seconds(evaluate: Callable[[int], object], modes: int, device: torch.device) -> float:
    """Wall seconds of ``evaluate(modes)``, the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    evaluate(modes)
    wait(device)
    return time.perf_counter() - start
