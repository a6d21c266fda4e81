"""The weights with which a step of a solver combines the answers at hand.

A row has the sum 1. Most are the means of Lagrange polynomials over the step. They grow without bound where steps
are uneven, and amplify whatever noise the answers carry by the sum of their magnitudes: where it exceeds ``LIMIT``,
or a solver's lower ``cap``, the step takes a lower order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

StepWeights = tuple[float, ...]
"""Weights with sum 1 of the newest answers, newest first."""

Rule = Callable[[Sequence[float], float, float], StepWeights]
"""(coordinates of the answers, newest first; start and end of the step) -> row of as many weights."""

LIMIT = 1e6
"""Sum of magnitudes of a row above which a float32 answer would be rounding noise; no row exceeds it."""


def rows(u: Sequence[float], orders: Sequence[int], rule: Rule, cap: float = LIMIT) -> list[StepWeights]:
    """StepWeights of each step by ``rule`` in the coordinate ``u`` of the K + 1 nodes, at most of the order given."""
    return [highest(rule, u[i + 1 - order : i + 1][::-1], u[i], u[i + 1], cap) for i, order in enumerate(orders)]


def highest(rule: Rule, points: Sequence[float], start: float, end: float, cap: float) -> StepWeights:
    """StepWeights over as many of the newest points as keep the sum of the weights' magnitudes within ``cap``.

    Points that coincide in float64 give infinite weights or none, and go the same way.
    """
    with np.errstate(all="ignore"):
        for count in range(len(points), 1, -1):
            row = rule(points[:count], start, end)
            if sum(map(abs, row)) <= min(cap, LIMIT):
                return row
    return (1.0,)


NODES, GAUSS = np.polynomial.legendre.leggauss(32)


def lagrange(points: Sequence[float], start: float, end: float, tilt: float = 0.0) -> StepWeights:
    """Mean of each point's Lagrange polynomial from ``start`` to ``end``, with density exp(tilt u).

    By Gauss-Legendre quadrature, exact for tilt 0 and to rounding for steps up to 30 in lambda. A step of no
    length gives the polynomials' values there.
    """
    u = start + (NODES + 1) / 2 * (end - start)
    density = GAUSS * np.exp(tilt * u - np.max(tilt * u))
    means = (np.average(product, weights=density) for product in _polynomials(points, u))
    return tuple(float(mean) for mean in means)


def _polynomials(points: Sequence[float], u: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Each point's Lagrange polynomial at ``u``: 1 at its own point, 0 at the others."""
    for j, point in enumerate(points):
        product = np.ones_like(u)
        for k, other in enumerate(points):
            if k != j:
                product = product * ((u - other) / (point - other))
        yield product


def half(points: Sequence[float], start: float, end: float) -> StepWeights:
    """Two points, the first at ``start``: half the slope, as published for second order.

    ``x0 + (x0 - x0_previous) / (2 r)`` with r = h_i / h_{i+1}. Written without r, because a final step from
    index 0 to index 0 has h_{i+1} = 0.
    """
    extra = float(np.float64(end - start) / (2 * (start - points[1])))
    return (1 + extra, -extra)


def published(points: Sequence[float], start: float, end: float, tilt: float) -> StepWeights:
    """As in the code of DPM-Solver: ``half`` or, over three points, half the second difference it should be."""
    if len(points) == 2:
        return half(points, start, end)
    exact = lagrange(points, start, end, tilt)
    square = sum(weight * (point - start) ** 2 for weight, point in zip(exact, points, strict=True))
    a, b, c = (np.float64(point) for point in points)
    second = (1 / ((a - b) * (a - c)), 1 / ((b - a) * (b - c)), 1 / ((c - a) * (c - b)))
    return tuple(float(weight - square / 2 * part) for weight, part in zip(exact, second, strict=True))


# A mean in alpha / sigma = exp(lambda) has density exp(lambda) over lambda, one in sigma / alpha exp(-lambda).
exact_by_data: Rule = functools.partial(lagrange, tilt=1.0)
exact_by_noise: Rule = functools.partial(lagrange, tilt=-1.0)
published_by_data: Rule = functools.partial(published, tilt=1.0)
published_by_noise: Rule = functools.partial(published, tilt=-1.0)


def half_or_exact(points: Sequence[float], start: float, end: float) -> StepWeights:
    """UniPC's predictor: of two points ``half``, of three the exact integral."""
    return half(points, start, end) if len(points) == 2 else exact_by_data(points, start, end)


def exact_or_mean(points: Sequence[float], start: float, end: float) -> StepWeights:
    """UniPC's corrector: of two points their mean, of more the exact integral."""
    return (0.5, 0.5) if len(points) == 2 else exact_by_data(points, start, end)
