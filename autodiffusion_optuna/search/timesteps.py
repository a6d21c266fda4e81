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
from autodiffusion_optuna.search.dmn import dmn_levels
from autodiffusion_optuna.search.repair import Timesteps, spread

KARRAS_RHO = 7.0

DMN_STEPS = 32

AYS_SIGMAS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152)
"""sigma / alpha of ten steps of Stable Diffusion 1.5, as their authors publish them (arXiv 2404.14507)."""


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
    return nearest_timesteps(schedule, low + _ramp(steps) * (high - low))


def karras(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Even in (sigma / alpha)^(1/7) from end to end (EDM, arXiv 2206.00364, eq. 5)."""
    low, high = np.exp(-schedule.lambdas[[0, -1]] / KARRAS_RHO)
    return nearest_timesteps(schedule, KARRAS_RHO * np.log(low + _ramp(steps) * (high - low)))


def arctan(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Even in arctan(sigma / alpha): best for unit Gaussian data (AYS, arXiv 2404.14507, thm 3.1)."""
    low, high = np.arctan(np.exp(-schedule.lambdas[[0, -1]]))
    return nearest_timesteps(schedule, np.log(np.tan(low + _ramp(steps) * (high - low))))


def dmn(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Least bound of a multistep solver's error, by the noise schedule alone, after DMN (arXiv 2402.17376).

    Not DMN itself: ``dmn_levels`` says where its bound is another.

    More than ``DMN_STEPS`` steps are interpolated between as many, so that it takes no seconds.
    """
    if steps == 1:
        return (schedule.T - 1,)
    levels = dmn_levels(schedule, min(steps, DMN_STEPS, schedule.T))
    return resample(schedule, nearest_timesteps(schedule, levels), steps)


def ays(schedule: NoiseSchedule, steps: int) -> Timesteps:
    """Align Your Steps' ten noise levels for Stable Diffusion 1.5 (arXiv 2404.14507), interpolated by ``resample``."""
    return resample(schedule, nearest_timesteps(schedule, np.log(AYS_SIGMAS)), steps)


def suits(name: str, schedule: NoiseSchedule) -> bool:
    """Whether a baseline says anything of a noise schedule.

    "ays" is a table of noise levels: it is for variance-preserving models (eps and v), not for flows, and their levels
    must reach its highest one.
    """
    return name != "ays" or (schedule.variance_preserving and -schedule.lambdas[-1] > math.log(0.99 * AYS_SIGMAS[0]))


BASELINES: dict[str, Callable[[NoiseSchedule, int], Timesteps]] = {
    "uniform": lambda schedule, steps: uniform_timesteps(schedule.T, steps),
    "uniform-trailing": uniform_trailing,
    "dmn": dmn,
    "ays": ays,
    "uniform-linspace": uniform_linspace,
    "quadratic": quadratic,
    "cosine": cosine,
    "log-snr": log_snr,
    "karras": karras,
    "arctan": arctan,
}
"""In the order in which a search tries them: a short one does not come to the last."""


def baseline_timesteps(schedule: NoiseSchedule, steps: int, min_gap: int = 1) -> dict[str, Timesteps]:
    """Baselines that suit a schedule, at least ``min_gap`` apart; with few steps two names may hold equal lists."""
    _check_steps(schedule.T, steps, min_gap)
    return {
        name: spread(make(schedule, steps), schedule.T, min_gap)
        for name, make in BASELINES.items()
        if suits(name, schedule)
    }


def nearest_timesteps(schedule: NoiseSchedule, log_levels: Array, min_gap: int = 1) -> Timesteps:
    """Distinct indices whose log(sigma / alpha) is nearest to each of ``log_levels``, float64 [K], not ascending."""
    _check_steps(schedule.T, len(log_levels), min_gap)
    distances = np.abs(-schedule.lambdas[:, None] - log_levels[None, :])
    return spread(distances.argmin(axis=0).tolist(), schedule.T, min_gap)


def resample(schedule: NoiseSchedule, timesteps: Timesteps, steps: int, min_gap: int = 1) -> Timesteps:
    """A list of another number of steps along the same curve of noise levels.

    Linear in log(sigma / alpha) over evenly spaced positions, as the authors of AYS do for other counts
    (https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html). The K levels and the grid's lowest, where
    the last step ends, are K + 1 nodes of K steps; a list that ends at index 0 has only its own K, and keeps both ends.
    The same number of steps gives the same list.
    """
    found = -schedule.lambdas[list(timesteps)]
    if timesteps[-1] == 0:
        wanted = np.interp(np.linspace(0, len(found) - 1, steps), np.arange(len(found)), found)
    else:
        nodes = np.append(found, -schedule.lambdas[0])
        wanted = np.interp(np.arange(steps) * (len(found) / steps), np.arange(len(nodes)), nodes)
    return nearest_timesteps(schedule, wanted, min_gap)


def _ramp(steps: int) -> Array:
    """``steps`` numbers from 1 down to 0, float64 [steps]; one step is 1, the noisy end."""
    return np.linspace(1.0, 0.0, steps)


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
