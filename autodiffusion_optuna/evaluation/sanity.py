"""Does a model denoise at all? What loads without an error may still be put together wrongly.

A wrong prediction type, wrong betas, unscaled weights or a wrong order of attention heads change no name and no shape
of any weight. They show in what the network makes of noised images, at three noise levels:

1. A network that was trained leaves far less error than the best linear filter does, which knows no more than the mean
   and the power spectrum of the images (Wiener's).
2. The expected clean image is uncorrelated with its own error, so that nothing is gained by rescaling it, or by adding
   a multiple of the noisy image (the orthogonality principle). What is gained shows levels or weights that are off.

``benchmarks/sanity.py`` shows what both find and what they do not: noise levels that are off by little, weights
rounded to 8 bits, attention with the wrong number of heads and any fault that hardly matters pass. On its own samples
even a wrong model is at home: wrong weights and most prediction types are reported, betas, attention and scales of
latents mostly not. A model distilled to few steps gives samples instead of expectations, and may be reported though it
is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.models.base import Model
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.evaluation.solvers import SOLVERS, Denoise, times
from autodiffusion_optuna.noise import NoiseSchedule

LEVELS = (4.0, 1.0, 0.25)
"""Powers of the images' signal over the noise's. Right models differ most from filters here, whatever they show."""
NO_BETTER = 1.1
"""Error over the filter's from which a model is no better. The filter has seen the very images that it is measured on:
the best possible model of images that a filter describes in full comes to 1.02 in 16 images and 1.06 in 4."""
NO_GAIN = 0.85
"""Share of its error that rescaling must leave a model. Trained ones keep 0.97 or more, in 16 images or in 4."""
IMAGES, FEWEST, NUMBERS = 16, 4, 2**16
STEPS = 20
LEAST_SIGNAL = 0.1
"""alpha / sigma from which own samples are drawn; below, small errors of right models that do not clip grow large."""
SEED = 0x5A17

FLOW = "the scheduler's shift, the decoder's scaling_factor and shift_factor, scales beside the weights"
SUSPECTS = {
    "adm": "use_new_attention_order, num_head_channels, noise_schedule and predict_xstart in model.fields",
    "plugin": "the plug-in's prediction, schedule and weights",
    "FluxPipeline": FLOW,
    "StableDiffusion3Pipeline": FLOW,
}
LATENT = "prediction_type and betas of the scheduler, the decoder's scaling_factor, scales beside the weights"
PLAIN = "prediction_type and betas of the scheduler, scales beside the weights"


@dataclass(frozen=True)
class Level:
    """Mean squared errors of clean states at one noise level.

    ``signal``: power of the states' variation over the noise's. ``t``: time index. ``error``: the model's.
    ``filtered``: of the best linear filter. ``rescaled``: of the best a x0 + b x + c, with the model's x0.
    """

    signal: float
    t: int
    error: float
    filtered: float
    rescaled: float

    @property
    def ratio(self) -> float:
        """The model's error over the filter's; see ``NO_BETTER``."""
        return self.error / self.filtered if math.isfinite(self.error) else math.inf

    @property
    def kept(self) -> float:
        """Share of the model's error that rescaling leaves; 1 where nothing is gained."""
        return self.rescaled / self.error if math.isfinite(self.error) and self.error > 0 else 1.0


def check_model(model: Model, images: Tensor | None, batch: int) -> list[str]:
    """A line where ``model`` seems to be put together wrongly, or could not be checked; none where it is sound.

    ``images``: uint8 [N, C, H, W] like those it was trained on, of its size or larger; without them, or for latents
    that cannot be encoded, its own samples take their place, which finds less. ``batch``: images that fit in one
    evaluation. Takes 3 evaluations of 4 to 16 images, and 20 more for own samples; draws from no shared randomness.
    """
    try:
        states = _states(model, images)
        own = states is None
        if states is None:
            states = own_samples(model, batch)
        levels = measure(model, states, batch)
    except torch.OutOfMemoryError:
        return [f"model {model.name!r}: not checked at load, the device has too little memory for it beside all else"]
    where = "its own samples, as there are no images of the reference to take" if own else "images of the reference"
    if not levels:
        return [f"model {model.name!r}: not checked at load, as {where.partition(',')[0]} do not vary"]
    found = doubt(levels)
    if found is None:
        return []
    shown = ", ".join(f"{level.ratio:.2g}" for level in levels)
    at = "one noise level" if len(levels) == 1 else f"{len(levels)} noise levels"
    return [
        f"model {model.name!r} {found}: errors at {at} {shown} of a linear filter's, on {where}. "
        f"If it was trained, check {suspects(model)}; model.check = false is without this check"
    ]


def suspects(model: Model) -> str:
    """What is mostly wrong with a model of this kind that loads and does not denoise."""
    return SUSPECTS.get(model.kind, LATENT if model.decode is not None else PLAIN)


def doubt(levels: Sequence[Level]) -> str | None:
    """What is wrong with a model of these errors, in words; None where nothing is."""
    if any(level.ratio >= NO_BETTER for level in levels):
        return "denoises no better than a linear filter"
    least = min(level.kept for level in levels)
    if least < NO_GAIN:
        return f"misjudges its noise, rescaling would take away {1 - least:.0%} of its error"
    return None


def measure(model: Model, states: Tensor, batch: int) -> list[Level]:
    """The model's errors at ``LEVELS`` on clean ``states`` [N, C, H, W], N >= 2; none where they do not vary."""
    clean = states.to(model.device, torch.float32)
    centre = clean.mean((0, 2, 3), keepdim=True)
    variance = float((clean - centre).square().mean())
    if not (math.isfinite(variance) and variance > 0):
        return []
    generator = torch.Generator().manual_seed(SEED)
    levels = []
    for signal in LEVELS:
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        t = _time_of(model.schedule, signal / variance)
        if t is None:
            continue
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        noisy = alpha * clean + sigma * noise
        x0 = torch.cat([_denoise(model, part)(part, t) for part in torch.split(noisy, batch)])
        estimates = x0, _filtered(clean, noisy, alpha, sigma), _rescaled(x0, noisy, clean)
        levels.append(Level(signal, t, *(_mse(estimate, clean) for estimate in estimates)))
    return levels


def _states(model: Model, images: Tensor | None) -> Tensor | None:
    """A few images as the model's states; None where there are none of its size or above, or none can be encoded."""
    if images is None or len(images) < FEWEST or (model.decode is not None and model.encode is None):
        return None
    channels, height, width = model.picture_shape
    if images.shape[1] != channels or images.shape[2] < height or images.shape[3] < width:
        return None
    some = images[:: math.ceil(len(images) / _count(model))].to(model.device, torch.float32)
    if tuple(some.shape[2:]) != (height, width):
        some = functional.interpolate(some, (height, width), mode="bicubic", antialias=True).clamp(0, 255)
    some = some / 127.5 - 1
    return some if model.encode is None else model.encode(some)


def own_samples(model: Model, batch: int) -> Tensor:
    """States that the model draws itself: deterministic DDIM over a few uniform steps, begun at ``LEAST_SIGNAL``."""
    ratios = np.asarray(model.schedule.alphas) / np.maximum(model.schedule.sigmas, 1e-12)
    last = int(np.flatnonzero(ratios >= min(LEAST_SIGNAL, ratios.max())).max())
    steps = np.unique(np.linspace(0, last, STEPS).round().astype(int))[::-1]
    nodes = times(model.schedule, [int(t) for t in steps], "zero")
    parts = []
    for noise in torch.split(Bank(SEED, 0, model.shape).noise(0, _count(model)), batch):
        parts.append(SOLVERS["ddim"](_denoise(model, noise), noise.to(model.device), nodes))
    return torch.cat(parts)


def _count(model: Model) -> int:
    """Images to take: fewer where each is large, and tells more."""
    return min(max(NUMBERS // math.prod(model.shape), FEWEST), IMAGES)


def _denoise(model: Model, x: Tensor) -> Denoise:
    """The model for ``x``, without guidance, which would lead away from the expected clean image."""
    conditions, scales = model.conditions, {"none": None, "free": 1.0, "classifier": 0.0, "embedded": 1.0}
    if model.guidance == "free" and conditions is not None and conditions.negative is not None:
        assert isinstance(model.denoiser, Denoiser)
        return partial(model.denoiser, condition=conditions.negative(len(x)), scale=1.0)
    # Labels are dealt out to the images, whatever they show, where none means no class.
    labels = conditions.count if conditions and conditions.kind == "labels" else 1
    denoise = model.bind([i * labels // len(x) for i in range(len(x))], scales[model.guidance])
    return lambda x, t: denoise(x, t, 0)


def _time_of(schedule: NoiseSchedule, ratio: float) -> int | None:
    """Time index whose alpha^2 / sigma^2 is nearest to ``ratio``; None where all are further than a factor of 2."""
    with np.errstate(divide="ignore"):
        away = np.abs(2 * np.log(np.asarray(schedule.alphas) / schedule.sigmas) - math.log(ratio))
    t = int(np.nanargmin(away))
    return t if away[t] <= math.log(2) else None


def _filtered(clean: Tensor, noisy: Tensor, alpha: float, sigma: float) -> Tensor:
    """Wiener's filter: by frequency and channel, with the mean and the power spectrum of the clean states."""
    centre = clean.mean((0, 2, 3), keepdim=True)
    pixels = clean.shape[2] * clean.shape[3]
    power = torch.fft.fft2(clean - centre).abs().square().mean(0, keepdim=True) / pixels
    gain = alpha * power / (alpha**2 * power + sigma**2)
    filtered: Tensor = centre + torch.fft.ifft2(gain * torch.fft.fft2(noisy - alpha * centre)).real
    return filtered


def _rescaled(x0: Tensor, noisy: Tensor, clean: Tensor) -> Tensor:
    """The best a x0 + b noisy + c."""
    columns = [x0.flatten().double(), noisy.flatten().double(), torch.ones(x0.numel()).to(clean).double()]
    given = torch.stack(columns, 1)
    if not bool(given.isfinite().all()):
        return x0
    gram, target = given.T @ given, given.T @ clean.flatten().double()
    best: Tensor = given @ torch.linalg.pinv(gram, hermitian=True) @ target
    return best.reshape(clean.shape)


def _mse(x: Tensor, clean: Tensor) -> float:
    return float((x.double() - clean.double()).square().mean())
