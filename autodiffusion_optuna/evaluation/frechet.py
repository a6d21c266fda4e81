"""Distances between two sets of features: Fréchet distance and kernel distance, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autodiffusion_optuna.errors import StatisticsError

if TYPE_CHECKING:
    from autodiffusion_optuna.evaluation.references.reference import Reference

NEGATIVE = 1e-3  # how far below 0, relative to the largest, an eigenvalue counts as round-off
CHUNK = 2048  # rows handled at once where a sum over all rows would need too much memory


class Moments:
    """Running mean and covariance of features, in float64.

    Features may come in batches of any size: the statistics of a longer prefix of the image bank extend those of a
    shorter one. Deviations are summed around the mean of their batch (Chan, Golub and LeVeque 1979), so a large mean
    costs no digits.
    """

    def __init__(self, dim: int | None = None) -> None:
        """No images yet; the first features decide the device, and D where ``dim`` is None."""
        self.n = 0
        self.dim = dim
        self._mean = torch.empty(0)
        self._scatter = torch.empty(0, 0)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of ``features`` float [N, D]."""
        moments = cls()
        for rows in torch.split(_checked(features, "features"), CHUNK):
            moments.add(rows)
        return moments

    def add(self, features: Tensor) -> None:
        """Take in ``features`` float [B, D]; StatisticsError where they are not finite or D differs."""
        rows = _checked(features, "features").to(torch.float64)
        n, dim = rows.shape
        if self.dim not in (None, dim):
            raise StatisticsError(f"features of {dim} dimensions cannot join those of {self.dim}: use one extractor")
        self.dim = dim
        if not n:
            return
        mean = rows.mean(dim=0)
        centred = rows - mean
        scatter = centred.T @ centred
        if not self.n:
            self.n, self._mean, self._scatter = n, mean, scatter
            return
        mean, scatter = mean.to(self._mean.device), scatter.to(self._mean.device)
        total = self.n + n
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.n * n / total)
        self._mean += shift * (n / total)
        self.n = total

    @property
    def mean(self) -> Tensor:
        """Mean, float64 [D]; StatisticsError before the first image."""
        if self.n < 1:
            raise StatisticsError("moments of no images have no mean; add features first")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """Covariance with divisor n - 1, float64 [D, D]; StatisticsError for fewer than two images."""
        if self.n < 2:
            raise StatisticsError(f"a covariance needs at least 2 images, {self.n} given; score more images")
        return self._scatter / (self.n - 1)


def covariance_factor(sigma: Tensor) -> Tensor:
    """L with L L^T = ``sigma`` (float64 [D, D], positive semidefinite), float64 [D, r].

    Cholesky where sigma has full rank; else eigenvectors, without those of round-off eigenvalues. StatisticsError
    where an eigenvalue is negative by more than what float32 files have.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not int(failed):
        return factor
    values, vectors = torch.linalg.eigh(sigma)
    if values[0] < -NEGATIVE * values[-1].abs():
        raise StatisticsError(f"its eigenvalues go from {float(values[0]):.3g} to {float(values[-1]):.3g}")
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    scaled: Tensor = vectors[:, kept] * values[kept].sqrt()
    return scaled


def frechet_distance(generated: Tensor | Moments, reference: Reference) -> float:
    """Squared Fréchet distance between the normal distributions of two sets of features.

    ``generated``: features float [N, D], N >= 2 and possibly below D, or their moments.
    |mu - mu_r|^2 + tr S + tr R - 2 tr (S R)^(1/2); the last trace is the sum of the roots of the eigenvalues
    of the Gram matrix of C L, where S = C^T C and R = L L^T, taken on its smaller side
    (arXiv 1706.08500, eq. 6; Gram form: arXiv 2009.14075). Round-off can make it slightly negative.
    StatisticsError for non-finite features, fewer than two images or another D than the reference's.
    """
    if isinstance(generated, Tensor):
        generated = _checked(generated, "generated features")
    dim = generated.shape[1] if isinstance(generated, Tensor) else len(generated.mean)
    _same_dim(dim, len(reference.mu))
    if isinstance(generated, Tensor) and 2 <= len(generated) <= reference.factor.shape[1]:
        rows = generated.to(torch.float64)
        mean = rows.mean(dim=0)
        centred = (rows - mean) / (len(rows) - 1) ** 0.5
        projected = centred @ reference.factor.to(rows.device)
        spread, gram = centred.square().sum(), projected @ projected.T
    else:
        moments = Moments.of(generated) if isinstance(generated, Tensor) else generated
        mean, covariance = moments.mean, moments.covariance
        factor = reference.factor.to(mean.device)
        spread, gram = covariance.trace(), factor.T @ covariance @ factor
    offset = (mean - reference.mu.to(mean.device)).square().sum()
    overlap = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    return float(offset + spread + reference.sigma.trace().to(mean.device) - 2 * overlap)


def mmd2_unbiased(generated: Tensor, reference: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy over all rows, with KID's kernel; no random draws.

    ``generated`` float [N, D], ``reference`` float [M, D], N and M >= 2. Source: arXiv 1801.01401, eq. 4.
    """
    x = _checked(generated, "generated features").to(torch.float64)
    y = _checked(reference, "reference features").to(x.device, torch.float64)
    _same_dim(x.shape[1], y.shape[1])
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise StatisticsError(
            f"a kernel distance needs at least 2 images on each side, {n} and {m} given; score more images"
        )
    within_x = (_kernel_sum(x, x) - _diagonal_sum(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _diagonal_sum(y)) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the kernel (x.y / D + 1)^3 over all pairs of rows."""
    blocks = [((rows @ y.T / x.shape[1] + 1) ** 3).sum() for rows in torch.split(x, CHUNK)]
    return torch.stack(blocks).sum()


def _diagonal_sum(x: Tensor) -> Tensor:
    """Sum of the kernel of every row with itself."""
    return ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum()


def _same_dim(generated: int, reference: int) -> None:
    if generated != reference:
        raise StatisticsError(
            f"generated features have {generated} dimensions, the reference {reference}: use its extractor"
        )


def _checked(features: Tensor, what: str) -> Tensor:
    """``features``, finite and [N, D], on a device that knows float64."""
    if features.ndim != 2:
        raise StatisticsError(f"{what} have shape {list(features.shape)}; they must be [images, dimensions]")
    if not bool(features.isfinite().all()):
        raise StatisticsError(f"{what} hold NaN or infinity; check the images and the extractor's weights")
    return features.cpu() if features.device.type == "mps" else features  # Apple's MPS has no float64
