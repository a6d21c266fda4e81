"""The distance of real images from a reference that holds them: what a perfect model would have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.evaluation.features import Extractor
from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance
from autodiffusion_optuna.evaluation.references.formats import read_reference_data
from autodiffusion_optuna.evaluation.references.images import Images
from autodiffusion_optuna.evaluation.references.reference import Reference

BATCH = 100


def real_distance(
    reference: Reference, path: Path | None, extractor: Extractor, images: int
) -> tuple[float, int, int] | str:
    """Fréchet distance of some real images of ``reference`` from all its others, how many, and how many others.

    ``images`` real ones, or half of all where there are fewer than twice as many; evenly spread. Their features are
    those that the reference keeps, else they are embedded again from ``path``, where it was made of images. A line
    that says why where neither is possible.
    """
    total = reference.n
    if total is None:
        return "the reference does not say how many images are behind it"
    count = min(images, total // 2)
    kept = reference.features
    try:
        if kept is not None and len(kept) >= count:
            features = kept[spread_over(len(kept), count)]
        else:
            found = None if path is None else read_reference_data(path).images
            if found is None or found.total != total:
                held = 0 if kept is None else len(kept)
                return f"the reference keeps the features of {held:,} images and not of {count:,}; give images"
            features = torch.cat(list(_embedded(found, extractor, count)))
        part = Moments.of(features.cpu())
        return frechet_distance(part, without(reference, part)), count, total - count
    except AdoptError as error:
        return str(error)


def spread_over(total: int, count: int) -> Tensor:
    """``count`` indices evenly spread over ``total``, int64 [count]."""
    return torch.arange(count) * total // count


def without(reference: Reference, part: Moments) -> Reference:
    """The reference without some of its images: mean and covariance of the rest, exactly."""
    assert reference.n is not None
    total, rest = reference.n, reference.n - part.n
    mu = (total * reference.mu.cpu() - part.n * part.mean) / rest
    shift = part.mean - mu
    scatter = (total - 1) * reference.sigma.cpu() - (part.n - 1) * part.covariance
    scatter -= torch.outer(shift, shift) * (part.n * rest / total)
    return replace(reference, mu=mu, sigma=scatter / (rest - 1), n=rest, features=None)


def _embedded(images: Images, extractor: Extractor, count: int) -> Iterator[Tensor]:
    """Features of ``count`` evenly spread images."""
    wanted = set(spread_over(images.total, count).tolist())
    start = 0
    for batch in images.batches(BATCH):
        chosen = [i for i in range(len(batch)) if start + i in wanted]
        if chosen:
            yield extractor(torch.from_numpy(batch[chosen]))
        start += len(batch)
