"""Modes of a step, said as bit sets."""

from __future__ import annotations

from autodiffusion_optuna.candidate import packed


def skips(mask: int) -> int:
    """Modes at which the units of a bit set are skipped."""
    return packed(skips=[u for u in range(mask.bit_length()) if mask >> u & 1])
