"""A cheap guess at which of several children is best, from all candidates scored so far.

Operators make more children than are evaluated; a Gaussian process over the finished trials chooses among them
(pre-selection in surrogate-assisted evolution; Jin, Swarm and Evolutionary Computation 1, 2011). It sees ranks
instead of values, so any objective will do, and it is fitted anew from the trials at each ask: it holds no state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search.history import Record
from autodiffusion_optuna.search.space import SearchSpace

Array = NDArray[np.float64]

ENOUGH = 8  # finished trials below which the guess is worth nothing
KEPT_BEST, KEPT_OTHERS = 200, 100  # trials fitted: the cost of an ask must not grow with the study
SCALES = (0.2, 0.4, 0.8, 1.6)  # length scales tried, in units of the median distance
NOISE = 1e-3  # variance of what the kernel cannot explain, of normal scores
OPTIMISM = 0.5  # standard deviations by which an uncertain child is preferred
SETTING_SCALES = (1.5, 4.5, 13.5)  # of the settings: in choices that differ, and median distances of numbers


class Embedding(NamedTuple):
    """Candidates of any length as points of one space.

    ``times``: float64 [N, max_steps + 1], the timesteps as shares of T, stretched to ``max_steps`` positions, and
    the number of steps. ``skips``: float64 [N, max_steps * units], the skip bits at those positions. ``choices``:
    float64 [N, sum of the numbers of choices], one at the one taken of each. ``numbers``: float64 [N, ranges], shares
    of their ranges. The last two have no columns where no settings are searched.
    """

    times: Array
    skips: Array
    choices: Array
    numbers: Array


def choose(children: Sequence[Candidate], complete: Sequence[Record], space: SearchSpace) -> Candidate:
    """The child with the best optimistic guess; the first one where too little is known to tell."""
    fitted = _fitted(complete)
    if len(children) == 1 or len(fitted) < ENOUGH:
        return children[0]
    known = embed([record.candidate for record in fitted], space)
    mean, deviation = predict(known, normal_scores([r.losses[0] for r in fitted]), embed(children, space))
    # Rounded, so that the last bits of a linear algebra library do not decide between equals.
    return children[int(np.argmin(np.round(mean - OPTIMISM * deviation, 9)))]


def _fitted(complete: Sequence[Record]) -> list[Record]:
    """The best trials, and an even choice of the others."""
    ordered = sorted(complete)
    best, rest = ordered[:KEPT_BEST], ordered[KEPT_BEST:]
    chosen = np.linspace(0, len(rest) - 1, min(len(rest), KEPT_OTHERS)).round().astype(int)
    return best + [rest[i] for i in chosen]


def embed(candidates: Sequence[Candidate], space: SearchSpace) -> Embedding:
    """Points of candidates; those of one length lie as far apart as their timesteps do."""
    row = _rows(space)
    rows = [row(candidate) for candidate in candidates]
    columns = [np.array([row[k] for row in rows]).reshape(len(rows), -1) for k in range(4)]
    return Embedding(*columns)


Row = tuple[Array, Array, tuple[float, ...], tuple[float, ...]]
"""One candidate of an embedding."""


@lru_cache(maxsize=8)
def _rows(space: SearchSpace) -> Callable[[Candidate], Row]:
    """``_row`` with a memory: the best trials are fitted again and again. Spaces are hashed once, not per candidate."""
    return lru_cache(maxsize=2048)(partial(_row, space))


def _row(space: SearchSpace, candidate: Candidate) -> Row:
    at = np.linspace(0.0, 1.0, space.max_steps)
    own = np.linspace(0.0, 1.0, candidate.steps)
    times = np.append(np.interp(at, own, np.array(candidate.timesteps) / space.T), candidate.steps / space.max_steps)
    skips = _bits(candidate.skips, len(space.units))[np.rint(at * (candidate.steps - 1)).astype(int)]
    settings = space.canonical_settings(candidate.settings_dict)
    choices = [float(settings[name] == value) for name, values in space.choices.items() for value in values]
    numbers = [(float(settings[n]) - low) / (high - low) for n, (low, high) in space.ranges.items()]
    return times, skips.ravel(), tuple(choices), tuple(numbers)


def _bits(skips: Sequence[int], units: int) -> Array:
    """Bit sets as float64 [N, units] of zeros and ones."""
    size = -(-units // 8)
    packed = np.frombuffer(b"".join(skip.to_bytes(size, "little") for skip in skips), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(len(skips), size), axis=1, count=units, bitorder="little")
    return bits.astype(np.float64)


def normal_scores(losses: Sequence[float]) -> Array:
    """Standard normal quantiles of the ranks, float64 [N], the smallest loss lowest; ties share their mean."""
    values = np.asarray(losses)
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    quantiles = (below + equal / 2) / len(values)
    return np.array([NormalDist().inv_cdf(q) for q in quantiles])


def predict(known: Embedding, scores: Array, asked: Embedding) -> tuple[Array, Array]:
    """Mean and standard deviation of the process at ``asked``, float64 [M] each.

    Matérn 5/2 kernel in the timesteps times an exponential one in the number of skip bits that differ; the length
    scale of both is the one of ``SCALES`` with the largest marginal likelihood (Rasmussen and Williams 2006, eq. 5.8).
    Settings, where any are searched, add an exponential factor in the number of choices that differ and a Matérn one
    in the numbers; how much they matter, a length scale of their own, is found likewise.
    """
    among, between = _distances(known, known), _distances(known, asked)
    units = [float(np.median(d[d > 0])) if (d > 0).any() else 1.0 for d in among]
    searched = known.choices.shape[1] or known.numbers.shape[1]
    best, found = -np.inf, None
    for scale in product(SCALES, SETTING_SCALES if searched else SETTING_SCALES[:1]):
        covariance = _kernel(among, units, scale) + NOISE * np.eye(len(scores))
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, scores)
        likelihood = -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
        if likelihood > best:
            best, found = likelihood, (scale, factor, white)
    assert found is not None
    scale, factor, white = found
    projected = np.linalg.solve(factor, _kernel(between, units, scale))
    variance = np.maximum(1.0 - (projected**2).sum(axis=0), 0.0)
    return projected.T @ white, np.sqrt(variance)


def _distances(one: Embedding, other: Embedding) -> tuple[Array, Array, Array, Array]:
    """Between times, skips, choices and numbers, float64 [N, M] each.

    Euclidean for times and numbers; how many skip bits and how many choices differ for the others.
    """
    return (
        _euclidean(one.times, other.times),
        _differing(one.skips, other.skips),
        _differing(one.choices, other.choices) / 2,
        _euclidean(one.numbers, other.numbers),
    )


def _euclidean(one: Array, other: Array) -> Array:
    squared = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    distances: Array = np.sqrt(np.maximum(squared, 0.0))
    return distances


def _differing(one: Array, other: Array) -> Array:
    """Number of bits that differ."""
    differing: Array = one.sum(1)[:, None] + other.sum(1) - 2 * one @ other.T
    return differing


def _kernel(distances: Sequence[Array], units: Sequence[float], scales: tuple[float, float]) -> Array:
    scale, of_settings = scales
    r = np.sqrt(5.0) * distances[0] / (scale * units[0])
    covariance: Array = (1.0 + r + r**2 / 3.0) * np.exp(-r - distances[1] / (scale * 4 * units[1]))
    if not distances[2].any() and not distances[3].any():
        return covariance  # no settings are searched, or all are alike: the factor is exactly 1
    r = np.sqrt(5.0) * distances[3] / (of_settings * units[3])
    covariance *= (1.0 + r + r**2 / 3.0) * np.exp(-r - distances[2] / of_settings)
    return covariance
