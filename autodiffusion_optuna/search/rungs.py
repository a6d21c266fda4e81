"""What a value at few images says of the value at all of them: a regression over the trials that have both.

A study's own complete trials tell how well each rung foretells the end, so little has to be believed of a rung
beforehand. Distances differ by factors, so positive values are compared by their logarithms; others, such as those of
the kernel distance, in units of their own spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr

from autodiffusion_optuna.search.ranks import rank_correlation

Array = NDArray[np.float64]

ENOUGH_PAIRS = 3
"""Complete trials below which a rung foretells nothing."""
LEAST_RANKS, SURE_RANKS = 0.5, 1.5
"""Rank correlation with the last value below which a rung ranks poorly, and what chance reaches among N trials: so
much over the root of N."""
REACH = 0.5  # how far from a value, on the scale of the regression, trials have half their say
SLOPE, SLOPE_WEIGHT = 1.0, 0.25  # prior: the end changes as the rung does; a spread of so much has as much say
DEVIATION, FREEDOM = 0.1, 3.0  # prior of how far the end lies from that, and how many trials it is worth


@dataclass(frozen=True, eq=False)
class RungRegression:
    """Last values on those at one rung, float64 [N] each, N >= ENOUGH_PAIRS, all finite, by Bayesian linear regression.

    Conjugate normal-inverse-gamma prior with a flat intercept (Gelman et al., Bayesian Data Analysis, 3rd ed., ch. 14).
    """

    rung: Array
    last: Array

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> RungRegression | None:
        """Of (value at the rung, last value) of the complete trials; None where too few are finite."""
        values = np.array(list(pairs), dtype=np.float64).reshape(-1, 2)
        values = values[np.isfinite(values).all(axis=1)]
        return cls(values[:, 0], values[:, 1]) if len(values) >= ENOUGH_PAIRS else None

    @cached_property
    def rank_correlation(self) -> float | None:
        """Spearman's, of the rung with the last value; None where one of them does not differ."""
        return rank_correlation(self.rung, self.last)

    @property
    def ranks(self) -> bool:
        """Whether the rung ranks as the last value does, as far as the trials tell."""
        least = min(max(LEAST_RANKS, SURE_RANKS / math.sqrt(len(self.rung))), 1 - 1e-9)
        return self.rank_correlation is not None and self.rank_correlation >= least

    def forecast(self, value: ArrayLike) -> tuple[Array, Array, Array]:
        """Mean, deviation and degrees of freedom (Student's t) of the last value for each at the rung.

        On the scale of ``scaled``. What is no number at the rung is worse than all at the end.
        """
        x, y = self._scaled_pairs
        given = np.atleast_1d(_scaled(np.asarray(value, dtype=np.float64), *self._scales[0]))
        finite = np.isfinite(given)
        asked = np.where(finite, given, 0.0)
        weights = 1 / (1 + ((asked[:, None] - x) / REACH) ** 2)
        total = weights.sum(axis=1)
        mean_x, mean_y = weights @ x / total, weights @ y / total
        dx, dy = x - mean_x[:, None], y - mean_y[:, None]
        spread = (weights * dx**2).sum(axis=1) + SLOPE_WEIGHT
        slope = ((weights * dx * dy).sum(axis=1) + SLOPE_WEIGHT * SLOPE) / spread
        squares = (weights * (dy - slope[:, None] * dx) ** 2).sum(axis=1)
        squares += FREEDOM * DEVIATION**2 + SLOPE_WEIGHT * (slope - SLOPE) ** 2
        freedom = FREEDOM + np.maximum(total - 1, 0)
        away = asked - mean_x
        deviation = np.sqrt(squares / freedom * (1 + 1 / total + away**2 / spread))
        ends = np.where(np.isneginf(given), -np.inf, np.inf)
        return np.where(finite, mean_y + slope * away, ends), deviation, freedom

    def chance_below(self, value: float, last: float) -> float:
        """Probability that a trial with ``value`` at the rung ends below ``last``."""
        (mean,), (deviation,), (freedom,) = self.forecast(value)
        return float(stdtr(freedom, (self.scaled(last) - mean) / deviation))

    def expected(self, values: ArrayLike) -> Array:
        """Last values expected for those at the rung, float64 [M], as trials tell them, not ``scaled``."""
        mean, _, _ = self.forecast(values)
        center, unit = self._scales[1]
        return np.exp(mean) if unit == 0 else center + unit * mean

    def scaled(self, last: float) -> float:
        """A last value on the scale of the forecasts."""
        return float(_scaled(np.asarray(last, dtype=np.float64), *self._scales[1]))

    @cached_property
    def _scales(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(center, unit) of rung and last values; unit 0 stands for the logarithm."""
        both = self.rung, self.last
        if all((values > 0).all() for values in both):
            return (0.0, 0.0), (0.0, 0.0)
        rung, last = ((float(values.mean()), float(values.std()) or 1.0) for values in both)
        return rung, last

    @cached_property
    def _scaled_pairs(self) -> tuple[Array, Array]:
        return _scaled(self.rung, *self._scales[0]), _scaled(self.last, *self._scales[1])


def _scaled(values: Array, center: float, unit: float) -> Array:
    if unit:
        return (values - center) / unit
    with np.errstate(divide="ignore"):
        found: Array = np.log(np.maximum(values, 0.0))
    return found
