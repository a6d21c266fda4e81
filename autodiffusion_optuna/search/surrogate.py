"""A cheap guess at which of several children is best, from all candidates scored so far.

Operators make more children than are evaluated; a Gaussian process over the finished trials chooses among them
(pre-selection in surrogate-assisted evolution; Jin, Swarm and Evolutionary Computation 1, 2011). It sees ranks
instead of values, so any objective will do, and it is fitted anew from the trials at each ask: it holds no state.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Embedding(NamedTuple):
    """Candidates of any length as points of one space.

    ``times``: float64 [N, max_steps + 1], the timesteps as shares of T, stretched to ``max_steps`` positions, and
    the number of steps. ``skips``: float64 [N, max_steps * units], the skip bits at those positions.
    """

    times: Array
    skips: Array


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
    positions, units = space.max_steps, len(space.units)
    times = np.empty((len(candidates), positions + 1))
    skips = np.zeros((len(candidates), positions, units))
    at = np.linspace(0.0, 1.0, positions)
    for row, candidate in enumerate(candidates):
        own = np.linspace(0.0, 1.0, candidate.steps)
        times[row, :-1] = np.interp(at, own, np.array(candidate.timesteps) / space.T)
        times[row, -1] = candidate.steps / space.max_steps
        if any(candidate.skips):
            for position, step in enumerate(np.rint(at * (candidate.steps - 1)).astype(int)):
                skips[row, position] = [candidate.skips[step] >> u & 1 for u in range(units)]
    return Embedding(times, skips.reshape(len(candidates), -1))


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
    """
    among, between = _distances(known, known), _distances(known, asked)
    units = [float(np.median(d[d > 0])) if (d > 0).any() else 1.0 for d in among]
    best, found = -np.inf, None
    for scale in SCALES:
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


def _distances(one: Embedding, other: Embedding) -> tuple[Array, Array]:
    """Euclidean distance of the times and number of differing skip bits, float64 [N, M] each."""
    squared = (one.times**2).sum(1)[:, None] + (other.times**2).sum(1) - 2 * one.times @ other.times.T
    differing = one.skips.sum(1)[:, None] + other.skips.sum(1) - 2 * one.skips @ other.skips.T
    return np.sqrt(np.maximum(squared, 0.0)), differing


def _kernel(distances: tuple[Array, Array], units: Sequence[float], scale: float) -> Array:
    r = np.sqrt(5.0) * distances[0] / (scale * units[0])
    covariance: Array = (1.0 + r + r**2 / 3.0) * np.exp(-r - distances[1] / (scale * 4 * units[1]))
    return covariance
