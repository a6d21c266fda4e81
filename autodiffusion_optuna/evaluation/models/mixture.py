"""A model without a network: the exact denoiser of a mixture of Gaussians.

Its samples can be compared with the truth in closed form, which no trained model allows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.features import Extractor
from autodiffusion_optuna.evaluation.models.base import Model, find_device
from autodiffusion_optuna.evaluation.references.reference import Reference, build_reference
from autodiffusion_optuna.evaluation.units import Branches
from autodiffusion_optuna.noise import linear

COMPONENTS = 8
SHAPE = (1, 4, 4)
SEED = 0
REFERENCE_IMAGES, REFERENCE_SEED = 50_000, 1


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Mixture of isotropic Gaussians, ``sum_i w_i N(m_i, s_i^2 I)``.

    ``weights`` float64 [M], positive, sum 1; ``means`` float64 [M, D]; ``stds`` float64 [M], positive.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | alpha x0 + sigma eps = x], of x's shape [B, ...] and float dtype; D numbers an item.

        Given component i, x is N(alpha m_i, v_i I) with v_i = alpha^2 s_i^2 + sigma^2, and the expected x0 is
        m_i + (alpha s_i^2 / v_i) (x - alpha m_i); components count by their posterior probabilities.
        """
        weights, means, stds = (p.to(x) for p in (self.weights, self.means, self.stds))
        variance = (alpha * stds) ** 2 + sigma**2
        away = x.flatten(1)[:, None, :] - alpha * means
        dimensions = means.shape[1]
        log_density = -dimensions / 2 * variance.log() - away.square().sum(2) / (2 * variance)
        share = torch.softmax(weights.log() + log_density, dim=1)
        expected = means + (alpha * stds**2 / variance)[:, None] * away
        return (share[:, :, None] * expected).sum(1).reshape(x.shape)

    def sample(self, n: int, seed: int) -> Tensor:
        """``n`` independent draws, float64 [n, D], the same for the same seed."""
        rng = np.random.default_rng(seed)
        component = torch.from_numpy(rng.choice(len(self.weights), size=n, p=self.weights.numpy()))
        noise = torch.from_numpy(rng.standard_normal((n, self.means.shape[1])))
        return self.means[component] + self.stds[component, None] * noise


def default_mixture() -> GaussianMixture:
    """The built-in mixture: 8 components in 16 dimensions, nearly all of its mass inside [-1, 1]."""
    rng = np.random.default_rng(SEED)
    weights = rng.uniform(1.0, 3.0, COMPONENTS)
    means = rng.uniform(-0.7, 0.7, (COMPONENTS, int(np.prod(SHAPE))))
    stds = rng.uniform(0.05, 0.1, COMPONENTS)
    return GaussianMixture(*(torch.from_numpy(part) for part in (weights / weights.sum(), means, stds)))


def mixture_model(T: int = 1000, device: str = "cpu", clip: bool = False) -> Model:
    """The built-in mixture as a model of shape (1, 4, 4) without units, exact in x's dtype.

    ``T``: times on the grid, above 20; linear betas scaled by 1000 / T, so that the noise levels at both ends
    stay much the same. ``clip``: clamp x0 to [-1, 1]. ``ConfigError`` where T is too small.
    """
    mixture = default_mixture()
    schedule = linear(T, 0.1 / T, 20 / T)

    def denoise(x: Tensor, t: float, modes: int = 0, branches: Branches | None = None, /) -> Tensor:
        if modes:
            raise ModelError(f"modes {modes:#x} were given, but 'mixture' has no units that can rest; use 0")
        with torch.inference_mode():
            x0 = mixture.x0(x, schedule.alpha(t), schedule.sigma(t))
            return x0.clamp(-1.0, 1.0) if clip else x0

    numbers = [part.numpy() for part in (mixture.weights, mixture.means, mixture.stds)]
    described = b"".join(part.tobytes() for part in (*numbers, schedule.alphas, schedule.sigmas))
    fingerprint = hashlib.sha256(b"mixture" + described).hexdigest()
    model = Model("mixture", fingerprint, SHAPE, schedule, denoise, find_device(device), kind="mixture")

    def reference(extractor: Extractor) -> Reference:
        draws = mixture.sample(REFERENCE_IMAGES, REFERENCE_SEED).reshape(-1, *SHAPE)
        return build_reference(model.to_images(draws), extractor, "mixture")

    return replace(model, reference=reference)
