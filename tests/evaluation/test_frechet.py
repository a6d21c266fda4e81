import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.frechet import (
    Moments,
    covariance_factor,
    frechet_distance,
    mmd2_unbiased,
)
from autodiffusion_optuna.evaluation.references.reference import Reference

GOLDEN = Path(__file__).parent.parent / "golden"
FEATURES = load_file(GOLDEN / "frechet.safetensors")
FACTS = json.loads((GOLDEN / "frechet.json").read_text())
PAIRS = pytest.mark.parametrize("pair", FACTS["pairs"], ids=lambda pair: pair["generated"])


def _reference(features: Tensor) -> Reference:
    moments = Moments.of(features)
    return Reference(moments.mean, moments.covariance, moments.n, "fingerprint", "extractor", "dataset")


def _normal(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@PAIRS
@pytest.mark.parametrize("kind", [lambda features: features, Moments.of], ids=["features", "moments"])
def test_golden_frechet_distance(pair: dict[str, Any], kind: Callable[[Tensor], Tensor | Moments]) -> None:
    reference = _reference(FEATURES[pair["reference"]])
    value = frechet_distance(kind(FEATURES[pair["generated"]]), reference)
    expected = pair["fid_from_feats_float64"]
    assert value == pytest.approx(expected, rel=1e-6, abs=5e-5 if pair["rank_deficient"] else 0)
    exact = pair["check_symmetric_eigenvalues_float64"]
    assert value == pytest.approx(exact, rel=1e-6 if pair["rank_deficient"] else 1e-10)


@PAIRS
def test_golden_unbiased_mmd(pair: dict[str, Any]) -> None:
    value = mmd2_unbiased(FEATURES[pair["generated"]], FEATURES[pair["reference"]])
    assert value == pytest.approx(pair["check_kid_all_samples_unbiased_float64"], rel=1e-9)


def test_golden_moments() -> None:
    moments = Moments.of(FEATURES["ref64"])
    torch.testing.assert_close(moments.mean, FEATURES["ref64.mu"], rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, FEATURES["ref64.sigma"], rtol=1e-10, atol=1e-14)


def test_identical_sets_are_at_distance_zero() -> None:
    reference = _reference(FEATURES["ref64"])
    assert abs(frechet_distance(FEATURES["ref64"], reference)) < 1e-10
    few = _reference(FEATURES["gen256_200"])
    assert abs(frechet_distance(FEATURES["gen256_200"], few)) < 5e-5


def test_diagonal_normals_have_the_closed_form() -> None:
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, -2.0])
    reference = Reference(torch.zeros(3).double(), torch.eye(3).double(), None, "", "", "")
    points = _normal(400, 3)
    # Whitened, so that the sample moments are exactly those of the formula.
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(points.T.cov()), (points - points.mean(0)).T, upper=False
    ).T
    expected = float((shift**2).sum() + ((scale - 1) ** 2).sum())
    assert frechet_distance(white * scale + shift, reference) == pytest.approx(expected, rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_moments_do_not_depend_on_batches(n: int, cuts: list[int], offset: float, seed: int) -> None:
    features = _normal(n, 3, seed) + offset
    parts = torch.tensor_split(features, sorted(min(cut, n) for cut in cuts))
    moments = Moments(3)
    for part in parts:
        moments.add(part)
    expected = np.cov(features.numpy(), rowvar=False)
    assert moments.n == n
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-9, atol=1e-10)


def test_moments_are_summed_in_float64() -> None:
    features = torch.full((20_000, 1), 5.1, dtype=torch.float32)
    assert float(Moments.of(features).mean) == pytest.approx(float(features[0]), rel=1e-14)


@pytest.mark.parametrize("n", [2, 5, 16, 100])
def test_features_and_moments_agree_for_any_number_of_images(n: int) -> None:
    reference, features = _reference(_normal(200, 16)), _normal(n, 16, seed=1) * 1.3
    by_moments = frechet_distance(Moments.of(features), reference)
    assert frechet_distance(features, reference) == pytest.approx(by_moments, abs=1e-5)


def test_dead_and_constant_dimensions_change_nothing_but_their_mean() -> None:
    features, target = _normal(100, 6, seed=1) * 1.2, _normal(300, 6)
    plain = frechet_distance(features, _reference(target))
    dead = torch.zeros(300, 2, dtype=torch.float64)
    dead[:, 1] = 3.0
    reference = _reference(torch.cat([target, dead], dim=1))
    assert reference.factor.shape == (8, 6)
    padded = torch.cat([features, dead[:100]], dim=1)
    assert frechet_distance(padded, reference) == pytest.approx(plain, rel=1e-7)
    padded[:, 7] = 5.0
    assert frechet_distance(padded, reference) == pytest.approx(plain + 4.0, rel=1e-7)


def test_constant_images_lose_all_variance() -> None:
    target = _normal(300, 6)
    reference = _reference(target)
    constant = target.mean(0).expand(50, 6)
    assert frechet_distance(constant, reference) == pytest.approx(float(reference.sigma.trace()), abs=1e-5)


def test_factor_of_a_singular_covariance() -> None:
    basis = _normal(8, 3)
    sigma = basis @ basis.T
    factor = covariance_factor(sigma)
    torch.testing.assert_close(factor @ factor.T, sigma, rtol=1e-10, atol=1e-10)
    assert covariance_factor(torch.zeros(4, 4, dtype=torch.float64)).shape == (4, 0)


def test_factor_is_computed_once() -> None:
    reference = _reference(_normal(50, 4))
    assert reference.factor is reference.factor


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    features, fine = _normal(10, 4), _normal(20, 4)
    features[3, 2] = bad
    for measure in (
        lambda: frechet_distance(features, _reference(fine)),
        lambda: Moments.of(features),
        lambda: mmd2_unbiased(features, fine),
    ):
        with pytest.raises(StatisticsError, match="NaN or infinity"):
            measure()


def test_misuse_is_named() -> None:
    fine, other = _normal(20, 4), _normal(20, 5)
    reference = _reference(fine)
    for measure, words in (
        (lambda: frechet_distance(other, reference), "5 dimensions, the reference 4"),
        (lambda: frechet_distance(Moments.of(other), reference), "5 dimensions, the reference 4"),
        (lambda: frechet_distance(fine[:1], reference), "at least 2 images"),
        (lambda: frechet_distance(Moments(4), reference), "no images"),
        (lambda: frechet_distance(fine[0], reference), "must be"),
        (lambda: mmd2_unbiased(other, fine), "5 dimensions, the reference 4"),
        (lambda: mmd2_unbiased(fine[:1], fine), "at least 2 images"),
        (lambda: Moments(5).add(fine), "use one extractor"),
    ):
        with pytest.raises(StatisticsError, match=words):
            measure()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_distances_agree_on_a_gpu() -> None:
    x, y = FEATURES["gen64_300"], FEATURES["ref64"]
    reference = _reference(y)
    assert frechet_distance(x.cuda(), reference) == pytest.approx(frechet_distance(x, reference), rel=1e-9)
    assert mmd2_unbiased(x.cuda(), y) == pytest.approx(mmd2_unbiased(x, y), rel=1e-9)
