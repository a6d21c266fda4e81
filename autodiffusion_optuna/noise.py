"""Noise levels of a diffusion model by time index, in float64. Needs numpy only, so both halves may use it."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autodiffusion_optuna.errors import ConfigError, choose_from

Final = Literal["zero", "sigma_min"]
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """``x_t = alpha(t) x_0 + sigma(t) eps`` on a grid of T times; index 0 is the least noisy.

    ``alphas``, ``sigmas``: float64 [T], sigma/alpha strictly increasing.
    ``model_times``: float64 [T], what the network takes as its timestep at each index.
    A fractional index interpolates log alpha linearly where alpha^2 + sigma^2 = 1, as DPM-Solver does (arXiv
    2206.00927, appendix D.4), log sigma where alpha is 1 (EDM), and else alpha and sigma themselves (flows): each is
    linear in what the network of that kind takes as its time, so that time and levels agree between indices too.
    """

    alphas: Array
    sigmas: Array
    model_times: Array

    @property
    def T(self) -> int:
        """Number of times on the grid."""
        return len(self.alphas)

    def alpha(self, t: float) -> float:
        """Signal level at time index t in [0, T - 1]."""
        if t == int(t):
            return float(self.alphas[int(t)])
        if self.variance_preserving:
            return math.exp(self._between(t, np.log(self.alphas)))
        return self._between(t, self.alphas)

    def sigma(self, t: float) -> float:
        """Noise level at time index t in [0, T - 1]."""
        if t == int(t):
            return float(self.sigmas[int(t)])
        if self.variance_preserving:
            return math.sqrt(1.0 - self.alpha(t) ** 2)
        if (self.alphas == 1).all():
            return math.exp(self._between(t, np.log(self.sigmas)))
        return self._between(t, self.sigmas)

    def _between(self, t: float, levels: Array) -> float:
        """Linear between the indices around ``t``."""
        return float(np.interp(t, np.arange(self.T), levels))

    def lambda_(self, t: float) -> float:
        """Half the log signal-to-noise ratio, log(alpha / sigma), at time index t."""
        return math.log(self.alpha(t) / self.sigma(t))

    @property
    def lambdas(self) -> Array:
        """log(alpha / sigma) at every index, float64 [T], strictly decreasing."""
        return np.log(self.alphas / self.sigmas)

    def pack(self) -> str:
        """The three arrays as text: float64 bytes, compressed, base64."""
        arrays = np.stack([self.alphas, self.sigmas, self.model_times]).astype("<f8")
        return base64.b64encode(zlib.compress(arrays.tobytes(), 9)).decode("ascii")

    @classmethod
    def unpack(cls, text: str) -> NoiseSchedule:
        """Inverse of ``pack``, exact."""
        arrays = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f8").reshape(3, -1)
        return cls(*(np.array(row, dtype=np.float64) for row in arrays))

    @property
    def variance_preserving(self) -> bool:
        """Whether alpha^2 + sigma^2 = 1 everywhere."""
        return bool(np.allclose(self.alphas**2 + self.sigmas**2, 1.0, rtol=0, atol=1e-9))


def from_alphas_cumprod(alphas_cumprod: Array) -> NoiseSchedule:
    """Variance-preserving schedule of the cumulative product of 1 - beta, float64 [T] (DDPM, arXiv 2006.11239)."""
    abar = np.asarray(alphas_cumprod, dtype=np.float64)
    if abar.ndim != 1 or not len(abar) or not (np.isfinite(abar).all() and (abar > 0).all() and (abar < 1).all()):
        raise ConfigError("noise schedule: alphas_cumprod must lie in (0, 1)")
    if not (np.diff(abar) < 0).all():
        raise ConfigError("noise schedule: alphas_cumprod must be strictly decreasing")
    return NoiseSchedule(np.sqrt(abar), np.sqrt(1.0 - abar), np.arange(len(abar), dtype=np.float64))


def from_betas(betas: Array) -> NoiseSchedule:
    """Variance-preserving schedule of per-step noise variances, float64 [T]."""
    return from_alphas_cumprod(np.asarray(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))))


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Betas evenly spaced (DDPM, arXiv 2006.11239, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, T))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Betas evenly spaced in their square root (latent diffusion, arXiv 2112.10752)."""
    return from_betas(np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T) ** 2)


def cosine(T: int = 1000) -> NoiseSchedule:
    """Squared-cosine cumulative product with betas capped at 0.999 (arXiv 2102.09672, eq. 17)."""
    level = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return from_betas(np.minimum(1.0 - level[1:] / level[:-1], 0.999))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """A variance-preserving schedule stretched so that its last time has no signal (arXiv 2305.08891, algorithm 1).

    Alpha there is 2^-12, as in diffusers, or half of the one before where that is no less: solvers divide by it.
    """
    first, last = schedule.alphas[0], schedule.alphas[-1]
    alphas = (schedule.alphas - last) * first / (first - last)
    alphas[-1] = 2.0**-12 if alphas[-2] > 2.0**-12 else alphas[-2] / 2
    return from_alphas_cumprod(alphas**2)


def edm(sigmas: Array) -> NoiseSchedule:
    """Variance-exploding schedule with alpha = 1; ``sigmas`` ascending, float64 [T] (EDM, arXiv 2206.00364).

    The network takes log(sigma) / 4 as its time.
    """
    levels = np.asarray(sigmas, dtype=np.float64)
    return NoiseSchedule(np.ones_like(levels), levels, np.log(levels) / 4)


def flow(T: int = 1000, shift: float = 1.0, span: float = 1000.0) -> NoiseSchedule:
    """Flow matching: alpha = 1 - s, sigma = s at s in (0, 1), shifted towards noise (arXiv 2403.03206, eq. 23).

    s = 1 itself has no signal and is left out of the grid. The network takes ``span`` s as its time.
    """
    uniform = np.arange(1, T + 1) / (T + 1)
    s = shift * uniform / (1 + (shift - 1) * uniform)
    return NoiseSchedule(1.0 - s, s, span * s)


def from_scheduler_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """Noise schedule of a diffusers scheduler's config (DDPM, DDIM, PNDM, DPM-Solver, Euler and their like)."""
    T = int(_number(config, "num_train_timesteps", 1000))
    if config.get("rescale_betas_zero_snr"):
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("v_prediction", "sample"):
            raise ConfigError(
                f"scheduler: rescale_betas_zero_snr=true leaves no signal at the last time, where prediction_type "
                f"{str(prediction)!r} does not tell the image; correct the one that the model was not trained with"
            )
        return zero_terminal_snr(from_scheduler_config({**config, "rescale_betas_zero_snr": False}))
    if config.get("trained_betas") is not None:
        return from_betas(np.asarray(config["trained_betas"]))
    if config.get("prediction_type") == "flow_prediction" or "FlowMatch" in str(config.get("_class_name", "")):
        return flow(T, _number(config, "shift" if "shift" in config else "flow_shift", 1.0), T)
    kind = str(config.get("beta_schedule", "linear"))
    start, end = _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02)
    if kind == "linear":
        return linear(T, start, end)
    if kind == "scaled_linear":
        return scaled_linear(T, start, end)
    if kind == "squaredcos_cap_v2":
        return cosine(T)
    raise ConfigError(
        "scheduler: " + choose_from("beta_schedule", kind, ["linear", "scaled_linear", "squaredcos_cap_v2"])
    )


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"scheduler: {key} is {value!r}; give a number") from None
