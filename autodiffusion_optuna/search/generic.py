"""A small genetic search over any Optuna distributions, for studies whose parameters are not ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.random import Generator
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial


def draw(rng: Generator, distribution: BaseDistribution) -> Any:
    """Uniform value (log-uniform where the distribution is) as a plain Python object."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    if isinstance(distribution, IntDistribution):
        return _draw_int(rng, distribution)
    if isinstance(distribution, FloatDistribution):
        return _draw_float(rng, distribution)
    raise TypeError(f"unknown distribution {distribution!r}")


def _draw_int(rng: Generator, distribution: IntDistribution) -> int:
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        value = round(math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5))))
        return min(max(value, low), high)
    return low + step * int(rng.integers((high - low) // step + 1))


def _draw_float(rng: Generator, distribution: FloatDistribution) -> float:
    low, high = distribution.low, distribution.high
    if distribution.log:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    elif distribution.step is not None:
        value = low + distribution.step * int(rng.integers(round((high - low) / distribution.step) + 1))
    else:
        value = float(rng.uniform(low, high))
    return min(max(value, low), high)


def child(
    rng: Generator,
    space: Mapping[str, BaseDistribution],
    parents: Sequence[FrozenTrial],
    probability: float,
) -> dict[str, Any]:
    """Values for all of ``space``: each from one of two parents, drawn anew with ``probability``.

    A parent that lacks a parameter, or had it in another range, gives none. Without parents all are drawn.
    """
    pair = [parents[int(rng.integers(len(parents)))] for _ in range(2)] if parents else []
    values: dict[str, Any] = {}
    for name in sorted(space):
        givers = [p for p in pair if p.distributions.get(name) == space[name]]
        if givers and rng.random() >= probability:
            values[name] = givers[int(rng.integers(len(givers)))].params[name]
        else:
            values[name] = draw(rng, space[name])
    return values
