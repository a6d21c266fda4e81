"""After DMN: noise levels that minimise a bound of a multistep solver's error, from the noise schedule alone."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from autodiffusion_optuna.noise import Array, NoiseSchedule

POWER = 2.0
"""The network's image is taken to err by sigma^POWER / alpha, as in the authors' code."""
SMALLEST = 1e-4
"""Share of the whole way that a step has at least; beneath it the weights lose their digits."""
DIFFERENCE = 1e-6
"""Of a logarithm, for slopes."""


def dmn_levels(schedule: NoiseSchedule, steps: int) -> Array:
    """log(sigma / alpha) of ``steps`` steps from the grid's noisiest level on, float64 [steps], descending.

    Minimises a bound of the error at the end, after "Accelerating Diffusion Sampling with Optimized Time Steps" (arXiv
    2402.17376): the sum over the steps of the norm of (e_n w_n), where w_n is the weight that the step gives to the
    network's image n by the exponential multistep solver of third order (of first in the first and the last step, of
    second in those beside them), and e_n how far that image may be wrong. The authors let later steps make up for each
    other; then what is best hangs on where one begins. The last step leads to the grid's cleanest level. Found by
    L-BFGS-B over the steps' logarithms, which keeps the levels in order, from even levels and from even times.
    """
    low, high = schedule.lambdas[[-1, 0]]
    times = np.linspace(schedule.T - 1, 0, steps + 1)
    starts = np.linspace(low, high, steps + 1), np.interp(times, np.arange(schedule.T), schedule.lambdas)
    best = min(
        (minimize(_bound, np.log(np.diff(start)), args=(schedule,), jac=True, method="L-BFGS-B") for start in starts),
        key=lambda result: float(result.fun),
    )
    return np.asarray(-_levels(best.x[None], schedule)[0, :-1])


def _bound(logs: Array, schedule: NoiseSchedule) -> tuple[float, Array]:
    """The bound for the logarithms of the steps, float64 [K], and its slopes."""
    moved = logs + DIFFERENCE * np.concatenate([np.eye(len(logs)), -np.eye(len(logs)), np.zeros((1, len(logs)))])
    values = error_bound(_levels(moved, schedule), schedule)
    ahead, behind = np.split(values[:-1], 2)
    return float(values[-1]), (ahead - behind) / (2 * DIFFERENCE)


def _levels(logs: Array, schedule: NoiseSchedule) -> Array:
    """log(alpha / sigma) at the nodes of rows of steps, float64 [B, K] -> [B, K + 1]: from end to end of the grid."""
    low, high = schedule.lambdas[[-1, 0]]
    shares = np.exp(logs - logs.max(1, keepdims=True))
    shares = shares / shares.sum(1, keepdims=True) + SMALLEST
    shares = shares / shares.sum(1, keepdims=True)
    return np.asarray(low + (high - low) * np.pad(shares.cumsum(1), ((0, 0), (1, 0))))


def error_bound(levels: Array, schedule: NoiseSchedule) -> Array:
    """The bound for rows of log(alpha / sigma), ascending, float64 [B, K + 1] -> [B]; in units of the last level's."""
    known = schedule.lambdas[::-1]
    log_alpha = np.interp(levels, known, np.log(schedule.alphas[::-1]))
    errors = np.exp((POWER - 1) * log_alpha - POWER * levels)  # sigma^p / alpha, where sigma is alpha e^-lambda
    steps, h = levels.shape[1] - 1, np.diff(levels)
    grown = np.exp(levels[:, :-1] - levels[:, -1:])
    total = np.zeros(len(levels))
    for step in range(steps):
        order = min(3, step + 1, steps - step)
        parts = [
            errors[:, step - back] * grown[:, step] * weight
            for back, weight in enumerate(step_weights(h[:, step - order + 1 : step + 1]))
        ]
        total += np.sqrt(np.square(parts).sum(0))
    return total


def step_weights(h: Array) -> list[Array]:
    """Integrals of e^u over the last of 1 to 3 steps in lambda, times the Lagrange polynomials of the newest images.

    ``h``: float64 [B, order], the steps up to that one. Of the newest image first, float64 [B] each.
    """
    last = h[:, -1]
    h0 = np.expm1(last)  # the moments of e^u: of 1, u and u^2
    h1 = last * np.exp(last) - h0
    if h.shape[1] == 1:
        return [h0]
    a = h[:, -2]
    if h.shape[1] == 2:
        return [h0 + h1 / a, -h1 / a]
    b = a + h[:, -3]
    h2 = last**2 * np.exp(last) - 2 * h1
    return [h0 + (h2 + (a + b) * h1) / (a * b), -(h2 + b * h1) / (a * (b - a)), (h2 + a * h1) / (b * (b - a))]
