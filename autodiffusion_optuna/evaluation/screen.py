"""The screen: a few images of a candidate against those that a fine run of the model makes of the same noise.

All candidates share their noise, so their differences are far less noisy than their distances to a reference: a mean
over few images ranks candidates much as a Fréchet distance over many. It is a mean over images, so it is unbiased at
any number of them, and two candidates can be compared image by image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.references.reference import Reference


@dataclass(frozen=True, eq=False)
class Screen:
    """Whitened features of the teacher's images.

    ``whitening``: W, float64 [D, D], see ``whitening_of``. ``teacher``: float64 [n, D], whitened, by image of the bank.
    """

    whitening: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, features: Tensor, reference: Reference) -> Screen:
        """From the teacher's ``features`` float [n, D]; StatisticsError where they are not finite."""
        whitening = whitening_of(reference)
        return cls(whitening, _whitened(features, whitening))

    @property
    def count(self) -> int:
        """Images that are compared."""
        return len(self.teacher)

    def distances(self, features: Tensor, start: int) -> list[float]:
        """|W (student - teacher)|^2 of images ``start`` and on, as many as are compared, for features float [B, D]."""
        teacher = self.teacher[start : start + len(features)]
        away = _whitened(features[: len(teacher)], self.whitening) - teacher
        found: list[float] = away.square().sum(dim=1).tolist()
        return found


def whitening_of(reference: Reference) -> Tensor:
    """W with W^T W the inverse of the reference's shrunk covariance, float64 [D, D], on the CPU.

    Of few images for many features the small eigenvalues are chance, and 0 beyond their number: each is drawn towards
    their mean by D / (D + n), which vanishes where images abound (shrinkage to a multiple of the identity; Ledoit and
    Wolf, J. Multivariate Analysis 88, 2004).
    """
    values, vectors = torch.linalg.eigh(reference.sigma)
    dim = len(values)
    images = reference.n if reference.n is not None else reference.factor.shape[1] + 1
    shrinkage = dim / (dim + images)
    shrunk = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.clamp(min=0).mean()
    whitening: Tensor = (vectors / shrunk.sqrt()).T
    return whitening


def _whitened(features: Tensor, whitening: Tensor) -> Tensor:
    """float64 [B, D] on the CPU: few rows, and some devices have no float64."""
    if not bool(features.isfinite().all()):
        raise StatisticsError("features hold NaN or infinity; check the images and the extractor's weights")
    return features.cpu().to(torch.float64) @ whitening.T
