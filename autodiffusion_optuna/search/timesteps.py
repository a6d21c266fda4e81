"""Baselines: published timestep lists, which a search starts from and has to beat.

Each is a function ``(schedule, steps)`` to ``steps`` distinct timestep indices in [0, T), strictly descending. A list
of one step is the end of the list that has the most noise, but for "uniform", whose only step is 0 by its definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.noise import Array, NoiseSchedule
from autodiffusion_optuna.search.repair import Timesteps, spread

KARRAS_RHO = 7.0


def uniform_timesteps(T: int, steps: int) -> Timesteps:
    """Multiples of ``T // steps``: DDIM's spacing, diffusers' "leading" (arXiv 2010.02502, app. D.2).

    The last step is 0, the first is well below T - 1.
    """
    _check_steps(T, steps)
    return tuple(i * (T // steps) for i in reversed(range(steps)))


def uniform_trailing(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Even spacing that starts at T - 1, "trailing" in diffusers (arXiv 2305.08891, table 2)."""
    T = schedule.T
    return _distinct([T - i * T / steps - 1 for i in range(steps)], T)


def uniform_linspace(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Even spacing that holds both T - 1 and 0, "linspace" in diffusers (arXiv 2305.08891, table 2)."""
    return _distinct(_ramp(steps) * (schedule.T - 1), schedule.T)


def quadratic(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Squares up to 0.8 T, dense at low noise (arXiv 2010.02502, app. D.2, with the factor of its code)."""
    return _distinct(_ramp(steps) ** 2 * (0.8 * schedule.T), schedule.T)


def cosine(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Quarter of a cosine from 0 to T - 1: dense at low noise, even at high noise."""
    return _distinct((1.0 - np.cos(_ramp(steps) * math.pi / 2)) * (schedule.T - 1), schedule.T)


def log_snr(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Even in log(alpha / sigma) from end to end (DPM-Solver, arXiv 2206.00927, section 3.4)."""
    low, high = -schedule.lambdas[[0, -1]]
    return _nearest(schedule, low + _ramp(steps) * (high - low))


def karras(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Even in (sigma / alpha)^(1/7) from end to end (EDM, arXiv 2206.00364, eq. 5)."""
    low, high = np.exp(-schedule.lambdas[[0, -1]] / KARRAS_RHO)
    return _nearest(schedule, KARRAS_RHO * np.log(low + _ramp(steps) * (high - low)))


def arctan(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Even in arctan(sigma / alpha): best for unit Gaussian data (AYS, arXiv 2404.14507, thm 3.1)."""
    low, high = np.arctan(np.exp(-schedule.lambdas[[0, -1]]))
    return _nearest(schedule, np.log(np.tan(low + _ramp(steps) * (high - low))))


BASELINES: dict[str, Callable[[NoiseSchedule, int], Timesteps]] = {
    "uniform": lambda schedule, steps: uniform_timesteps(schedule.T, steps),
    "uniform-trailing": uniform_trailing,
    "uniform-linspace": uniform_linspace,
    "quadratic": quadratic,
    "cosine": cosine,
    "log-snr": log_snr,
    "karras": karras,
    "arctan": arctan,
}


def baseline_timesteps(schedule: NoiseSchedule, steps: int, min_gap: int = 1) -> dict[str, Timesteps]:
    """Every baseline by name, at least ``min_gap`` apart; with few steps two names may hold equal lists."""
    _check_steps(schedule.T, steps, min_gap)
    return {name: spread(make(schedule, steps), schedule.T, min_gap) for name, make in BASELINES.items()}


def _ramp(steps: int) -> Array:
    """``steps`` numbers from 1 down to 0, float64 [steps]; one step is 1, the noisy end."""
    return np.linspace(1.0, 0.0, steps)


def _nearest(schedule: NoiseSchedule, log_levels: Array) -> Timesteps:
    """Indices whose log(sigma / alpha) is nearest to each of ``log_levels`` (descending)."""
    distances = np.abs(-schedule.lambdas[:, None] - log_levels[None, :])
    return _distinct(distances.argmin(axis=0).tolist(), schedule.T)


def _distinct(timesteps: Sequence[float] | Array, T: int) -> Timesteps:
    """Rounded to indices, collisions moved apart."""
    _check_steps(T, len(timesteps))
    return spread([round(float(t)) for t in timesteps], T)


def _check_steps(T: int, steps: int, min_gap: int = 1) -> None:
    if steps < 1 or (steps - 1) * min_gap >= T:
        raise ConfigError(
            f"{steps} timesteps at least {min_gap} apart do not fit on a grid of {T}; "
            f"allowed: 1 to {(T - 1) // min_gap + 1}"
        )
