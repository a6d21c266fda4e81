"""Rank correlation, with numpy alone: listings need it, and must start fast."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where there is none, for all are equal."""
    ranks = [_centred_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    scale = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / scale if scale else None


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    ordered = np.sort(values)
    below, upto = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return np.asarray((below + upto - len(values)) / 2)
