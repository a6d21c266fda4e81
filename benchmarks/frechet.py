"""Our Fréchet distance beside clean-fid's: 2,048 dimensions, 1,000 generated images.

    python benchmarks/frechet.py

Both start from the same features. clean-fid averages, takes the covariance and then a matrix square root
(``scipy.linalg.sqrtm``); ours factors the reference once and then takes the eigenvalues of a Gram matrix.
The factor is timed apart, because a search pays for it once and for the rest at every trial.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from cleanfid.fid import frechet_distance as clean_fid_distance
from common import record
from torch import Tensor

from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance
from autodiffusion_optuna.evaluation.references.reference import Reference

DIMENSIONS, GENERATED, REFERENCE = 2048, 1000, 5000
REPEATS = 5


def make_features(n: int, mixing: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Correlated, non-negative features float32 [n, D], as a network's last ReLU gives."""
    latent = torch.randn(n, len(mixing), generator=generator)
    noise = torch.randn(n, DIMENSIONS, generator=generator)
    return torch.relu(latent @ mixing + 0.5 * noise + shift)


def timed(measure: Callable[[], float], repeats: int = 1) -> tuple[float, float]:
    """The value and the median of its wall seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        value = measure()
        seconds.append(time.perf_counter() - started)
    return value, float(np.median(seconds))


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # scipy on the arguments clean-fid gives to sqrtm
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, DIMENSIONS, generator=generator) / 16
    real = make_features(REFERENCE, mixing, 0.0, generator)
    made = make_features(GENERATED, mixing, 0.05, generator)
    moments = Moments.of(real)
    reference = Reference(moments.mean, moments.covariance, moments.n, "none", "none", "synthetic")
    mu, sigma = reference.mu.numpy(), reference.sigma.numpy()

    def theirs() -> float:
        features = made.double().numpy()
        return float(clean_fid_distance(features.mean(0), np.cov(features, rowvar=False), mu, sigma))

    _, factor_seconds = timed(lambda: float(reference.factor.trace()))
    ours, our_seconds = timed(lambda: frechet_distance(made, reference), REPEATS)
    other, other_seconds = timed(theirs)
    result = {
        "dimensions": DIMENSIONS,
        "generated": GENERATED,
        "reference": REFERENCE,
        "factor_seconds": round(factor_seconds, 4),
        "seconds": round(our_seconds, 4),
        "clean_fid_seconds": round(other_seconds, 4),
        "speed_ratio": round(other_seconds / our_seconds, 1),
        "value": ours,
        "clean_fid_value": other,
        "relative_difference": abs(ours - other) / other,
    }
    print(f"ours      {our_seconds:8.3f} s   {ours:.6f}   (reference factor, once: {factor_seconds:.3f} s)")
    print(f"clean-fid {other_seconds:8.3f} s   {other:.6f}")
    print(f"{result['speed_ratio']} times as fast, relative difference {result['relative_difference']:.1e}")
    print(f"written to {record('frechet', result).name}")


if __name__ == "__main__":
    main()
