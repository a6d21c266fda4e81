"""A cheap guess at which of several children is best, from all candidates scored so far.

Operators make more children than are evaluated; a Gaussian process over the finished trials chooses among them
(pre-selection in surrogate-assisted evolution; Jin, Swarm and Evolutionary Computation 1, 2011). It sees ranks
instead of values, so any objective will do, and it is fitted to the trials at each ask: it holds no state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search.history import Record
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.thrift import costs_left

Array = NDArray[np.float64]

ENOUGH = 8  # finished trials below which the guess is worth nothing
KEPT_BEST, KEPT_OTHERS = 160, 60  # trials fitted: the cost of an ask must not grow with the study
SCALES = (0.2, 0.4, 0.8, 1.6)  # length scales tried, in units of the median distance
NOISE = 1e-3  # variance of what the kernel cannot explain, of normal scores
STOPPED_NOISE = 0.03  # that of trials whose end is only expected
OPTIMISM = 0.5  # standard deviations by which an uncertain child is preferred
SETTING_SCALES = (1.5, 4.5, 13.5)  # of the settings: in choices that differ, and median distances of numbers


class Embedding(NamedTuple):
    """Candidates of any length as points of one space.

    ``times``: float64 [N, max_steps + 1], the timesteps as ratios of T, stretched to ``max_steps`` positions, and the
    number of steps. ``modes``: float32 [N, max_steps * 2 units], the bits of the modes at those positions: sums of them
    are exact, at half the cost of float64. ``choices``: float64 [N, sum of the numbers of choices], one at the one
    taken of each. ``numbers``: float64 [N, ranges], ratios of their ranges. The last two have no columns where no
    settings are searched.
    """

    times: Array
    modes: NDArray[np.float32]
    choices: Array
    numbers: Array


def choose(
    children: Sequence[Candidate], ranked: Sequence[Record], space: SearchSpace, thrift: float = 0.0
) -> Candidate:
    """The child with the best optimistic guess; the first one where too little is known to tell.

    ``ranked``: the complete trials and, by what is expected of them, the stopped ones, best first. ``thrift``: how much
    worse a child may look, in normal scores, if it costs nothing instead of a whole run.
    """
    chosen = fitted(ranked)
    if len(children) == 1 or len(chosen) < ENOUGH:
        return children[0]
    known = embed([record.candidate for record in chosen], space)
    noise = np.array([STOPPED_NOISE if record.stopped else NOISE for record in chosen])
    mean, deviation = predict(known, normal_scores([r.losses[0] for r in chosen]), embed(children, space), noise)
    guess = mean - OPTIMISM * deviation
    if thrift:
        guess += thrift * costs_left(children, ranked, space)
    # Rounded, so that the last bits of a linear algebra library do not decide between equals.
    return children[int(np.argmin(np.round(guess, 9)))]


def fitted(ranked: Sequence[Record]) -> list[Record]:
    """The best trials, and an even choice of the others."""
    rest = len(ranked) - KEPT_BEST
    chosen = np.linspace(0, rest - 1, min(max(rest, 0), KEPT_OTHERS)).round().astype(int)
    return [*ranked[:KEPT_BEST], *(ranked[KEPT_BEST + i] for i in chosen)]


def embed(candidates: Sequence[Candidate], space: SearchSpace) -> Embedding:
    """Points of candidates; those of one length lie as far apart as their timesteps do."""
    return Embedding(*map(np.stack, zip(*map(_points(space), candidates), strict=True)))


@lru_cache(maxsize=8)
def _points(space: SearchSpace) -> Callable[[Candidate], Embedding]:
    """``_point`` with a cache, for the best trials are fitted again and again; a space is hashed once."""
    return lru_cache(maxsize=2048)(partial(_point, space))


def _point(space: SearchSpace, candidate: Candidate) -> Embedding:
    """One row of an embedding."""
    times, modes = np.array(candidate.timesteps) / space.T, candidate.modes
    if candidate.steps != space.max_steps:
        positions = np.linspace(0.0, 1.0, space.max_steps)
        times = np.interp(positions, np.linspace(0.0, 1.0, candidate.steps), times)
        modes = tuple(modes[step] for step in np.rint(positions * (candidate.steps - 1)).astype(int))
    size = -(-2 * len(space.units) // 8)
    packed = b"".join(at_step.to_bytes(size, "little") for at_step in modes)
    octets = np.frombuffer(packed, dtype=np.uint8).reshape(space.max_steps, size)
    bits = np.unpackbits(octets, axis=1, count=2 * len(space.units), bitorder="little").ravel().astype(np.float32)
    settings = space.canonical_settings(candidate.settings_dict)
    choices = [float(settings[name] == value) for name, values in space.choices.items() for value in values]
    numbers = [(float(settings[n]) - low) / (high - low) for n, (low, high) in space.ranges.items()]
    steps = candidate.steps / space.max_steps
    return Embedding(np.append(times, steps), bits, np.array(choices), np.array(numbers))


def normal_scores(losses: Sequence[float]) -> Array:
    """Standard normal quantiles of the ranks, float64 [N], the smallest loss lowest; ties share their mean."""
    values = np.asarray(losses)
    ordered = np.sort(values)
    below, upto = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    ranks = (below + (upto - below) / 2) / len(values)
    return np.array([_quantile(float(rank)) for rank in ranks])


_quantile = lru_cache(maxsize=4096)(NormalDist().inv_cdf)


def predict(known: Embedding, scores: Array, asked: Embedding, noise: Array | float = NOISE) -> tuple[Array, Array]:
    """Mean and standard deviation of the process at ``asked``, float64 [M] each.

    Matérn 5/2 kernel in the timesteps times an exponential one in the number of bits of modes that differ; the length
    scale of both is the one of ``SCALES`` with the largest marginal likelihood (Rasmussen and Williams 2006, eq. 5.8).
    Settings, where any are searched, add an exponential factor in the number of choices that differ and a Matérn one
    in the numbers; how much they matter, a length scale of their own, is found likewise.
    """
    among, between = distances(known, known), distances(known, asked)
    units = [float(np.median(d[d > 0])) if d.any() else 1.0 for d in among]
    # From here on each pair once, as places in a flat matrix: most of the time goes into their exponentials.
    size = len(scores)
    pairs, diagonal = np.flatnonzero(np.tri(size, dtype=np.bool_)), slice(None, None, size + 1)
    among = tuple(matrix.ravel().take(pairs) for matrix in among)
    flat = np.zeros(size * size)
    searched = known.choices.shape[1] or known.numbers.shape[1]
    best, found = -np.inf, None
    for scale in product(SCALES, SETTING_SCALES if searched else SETTING_SCALES[:1]):
        flat[pairs] = _kernel(among, units, scale)
        flat[diagonal] += noise
        factor = np.linalg.cholesky(flat.reshape(size, size))  # which reads the lower half alone
        white = solve_triangular(factor, scores, lower=True, check_finite=False)
        likelihood = -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
        if likelihood > best:
            best, found = likelihood, (scale, factor, white)
    assert found is not None
    scale, factor, white = found
    projected = solve_triangular(factor, _kernel(between, units, scale), lower=True, check_finite=False)
    variance = np.maximum(1.0 - (projected**2).sum(axis=0), 0.0)
    return projected.T @ white, np.sqrt(variance)


def distances(one: Embedding, other: Embedding) -> tuple[Array, ...]:
    """Between times, modes, choices and numbers, float64 [N, M] each.

    Euclidean for times and numbers; how many bits of modes and how many choices differ for the others.
    """
    return (
        _euclidean(one.times, other.times),
        _differing(one.modes, other.modes),
        _differing(one.choices, other.choices) / 2,
        _euclidean(one.numbers, other.numbers),
    )


def _euclidean(one: Array, other: Array) -> Array:
    squared: Array = (one**2).sum(1)[:, None] + (other**2).sum(1)
    if one.shape[1]:
        squared -= 2 * one @ other.T
        np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared)
    return squared


def _differing(one: NDArray[Any], other: NDArray[Any]) -> Array:
    """Number of bits that differ."""
    differing = one.sum(1)[:, None] + other.sum(1)
    if one.shape[1]:
        both = one @ other.T
        differing -= np.multiply(both, 2, out=both)
    return np.asarray(differing, dtype=np.float64)


def _kernel(distances: Sequence[Array], units: Sequence[float], scales: tuple[float, float]) -> Array:
    scale, of_settings = scales
    r = np.sqrt(5.0) * distances[0] / (scale * units[0])
    covariance: Array = (1.0 + r + r**2 / 3.0) * np.exp(-r - distances[1] / (scale * 4 * units[1]))
    if not distances[2].any() and not distances[3].any():
        return covariance  # no settings are searched, or all are alike: the factor is exactly 1
    r = np.sqrt(5.0) * distances[3] / (of_settings * units[3])
    covariance *= (1.0 + r + r**2 / 3.0) * np.exp(-r - distances[2] / of_settings)
    return covariance
