import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features import DIGITS_WEIGHTS, Extractor, load_extractor
from autodiffusion_optuna.evaluation.frechet import frechet_distance
from autodiffusion_optuna.evaluation.references import reference as module
from autodiffusion_optuna.evaluation.references.reference import (
    Reference,
    build_reference,
    check_images,
    load_reference,
    save_reference,
)

DIGITS = DIGITS_WEIGHTS.with_name("reference.npz")
HELD_OUT = Path(__file__).parent.parent / "data" / "digits_heldout.npz"
PIXELS = load_extractor("pixels", "cpu")
# Stands for Inception, with four dimensions: only name and dim matter to a reader of statistics.
INCEPTION = Extractor(
    "inception", "0" * 16, 4, torch.device("cpu"), lambda images: images.flatten(1).float(), mode="clean"
)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(256, (30, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def own(tmp_path: Path, images: Tensor) -> Path:
    path = tmp_path / "own.npz"
    save_reference(path, build_reference(images, PIXELS, "noise"))
    return path


def _write_png(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03}.png")
    return folder


def _assert_same(one: Reference, other: Reference) -> None:
    torch.testing.assert_close(one.mu, other.mu, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.sigma, other.sigma, rtol=1e-9, atol=1e-9)
    assert one.features is not None
    assert other.features is not None
    assert torch.equal(one.features, other.features)
    assert (one.n, one.fingerprint, one.extractor) == (other.n, other.fingerprint, other.extractor)


def _tampered(path: Path, **changes: Any) -> Path:
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive) | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_bundled_reference_fits_the_bundled_extractor() -> None:
    extractor = load_extractor("digits", "cpu")
    reference = load_reference(DIGITS, extractor)
    assert reference.n == 9000
    assert reference.features is not None
    assert reference.features.shape == (1000, 64)
    assert DIGITS.stat().st_size <= 400_000
    with np.load(HELD_OUT, allow_pickle=False) as data:
        held_out = torch.from_numpy(data["x"]).unsqueeze(1)
    real = frechet_distance(extractor(held_out), reference)
    grain = torch.randint(60, held_out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert 0 < real < 1 < frechet_distance(extractor(torch.maximum(held_out, grain)), reference)


def test_own_file_returns_what_was_saved(own: Path, images: Tensor) -> None:
    built, loaded = build_reference(images, PIXELS, "noise"), load_reference(own, PIXELS)
    _assert_same(built, loaded)
    assert loaded.dataset == "noise"
    assert torch.equal(built.mu, loaded.mu)
    assert loaded.mu.dtype == loaded.sigma.dtype == torch.float64
    assert not list(own.parent.glob("*.tmp"))


def test_statistics_of_images(images: Tensor) -> None:
    reference = build_reference(images, PIXELS, "noise")
    pixels = images.flatten(1).double().numpy()
    np.testing.assert_allclose(reference.mu, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(reference.sigma, np.cov(pixels, rowvar=False), rtol=1e-9, atol=1e-9)


def test_kept_features_are_evenly_spaced(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "KEPT_FEATURES", 10)
    kept = build_reference(images, PIXELS, "noise").features
    assert kept is not None
    assert torch.equal(kept, PIXELS(images)[::3])


def test_folder_and_arr_0_give_the_same(tmp_path: Path, images: Tensor) -> None:
    built = build_reference(images, PIXELS, "noise")
    _assert_same(load_reference(_write_png(tmp_path / "images", images), PIXELS), built)
    np.savez(tmp_path / "batch.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=np.zeros(30))
    _assert_same(load_reference(tmp_path / "batch.npz", PIXELS), built)


def test_grey_images_keep_one_channel(tmp_path: Path) -> None:
    folder = tmp_path / "grey"
    folder.mkdir()
    for index, suffix in enumerate((".png", ".JPG", ".jpeg")):
        Image.fromarray(np.full((4, 4), 40 * index, dtype=np.uint8)).save(folder / f"{index}{suffix}")
    (folder / "notes.txt").write_text("not an image")
    reference = load_reference(folder, PIXELS)
    assert reference.n == 3
    np.testing.assert_allclose(reference.mu, np.full(16, 40.0), atol=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_foreign_statistics_are_for_inception_only(tmp_path: Path, dtype: type[np.floating[Any]]) -> None:
    path = tmp_path / "cifar10.npz"
    np.savez(path, mu=np.ones(4, dtype), sigma=np.eye(4, dtype=dtype))
    reference = load_reference(path, INCEPTION)
    assert (reference.n, reference.dataset, reference.features) == (None, "cifar10", None)
    assert reference.fingerprint == INCEPTION.fingerprint
    assert reference.sigma.dtype == torch.float64
    with pytest.raises(StatisticsError, match="taken for Inception's"):
        load_reference(path, PIXELS)


def test_a_mismatch_of_extractors_names_both(own: Path) -> None:
    with pytest.raises(StatisticsError, match=r"extractor 'pixels' .* the study uses 'inception'"):
        load_reference(own, INCEPTION)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.ones((2, 2)), "sigma": np.eye(4)}, r"must be \[D\]"),
        ({"mu": np.ones(4), "sigma": np.ones((4, 3))}, r"must be \[D\]"),
        ({"mu": np.ones(3), "sigma": np.eye(4)}, r"must be \[D\]"),
        ({"mu": np.ones(0), "sigma": np.ones((0, 0))}, r"must be \[D\]"),
        ({"mu": np.ones(3), "sigma": np.eye(3)}, "gives 4 numbers"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "NaN"),
        ({"mu": np.ones(4), "sigma": np.full((4, 4), np.inf)}, "NaN"),
        ({"mu": np.ones(4), "sigma": np.triu(np.ones((4, 4)))}, "no covariance"),
        ({"mu": np.ones(4), "sigma": -np.eye(4)}, "no covariance"),
        ({"mu": np.ones(4), "sigma": np.ones((4, 4)) - np.eye(4) / 2}, "no covariance .its eigenvalues go from -0.5"),
        ({"mu": np.ones(4), "sigma": np.zeros((4, 4))}, "same features"),
        ({"mu": np.ones(4, dtype=np.int64), "sigma": np.eye(4)}, "no float array"),
        ({"mu": np.array([None] * 4), "sigma": np.eye(4)}, "plain arrays"),
        ({"weights": np.ones((3, 4))}, "holds weights"),
        ({"arr_0": np.zeros((5, 4, 4, 3))}, "images are uint8"),
        ({"arr_0": np.zeros((5, 3, 4, 4), dtype=np.uint8)}, "images are uint8"),
        ({"arr_0": np.zeros((5, 0, 4, 3), dtype=np.uint8)}, "images are uint8"),
        ({"arr_0": np.zeros((1, 2, 2, 1), dtype=np.uint8)}, "at least 2"),
        ({"arr_0": np.zeros((0, 2, 2, 1), dtype=np.uint8)}, "at least 2"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(StatisticsError, match=words):
        load_reference(path, INCEPTION)


def _meta(**changes: Any) -> np.ndarray[Any, Any]:
    meta = {"version": 1, "extractor": "pixels", "fingerprint": PIXELS.fingerprint, "n": 30, "dataset": ""}
    return np.array(json.dumps({key: value for key, value in (meta | changes).items() if value != "gone"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"meta": _meta(n="gone")}, "meta is damaged"),
        ({"meta": np.array("{")}, "meta is damaged"),
        ({"meta": np.array("[]")}, "meta is damaged"),
        ({"meta": _meta(n=1)}, "from 1 image"),
        ({"meta": _meta(version=2)}, "format 2"),
        ({"mu": None}, "mu is missing"),
        ({"features": np.zeros((5, 60))}, "features must be float32"),
        ({"features": np.zeros((5, 3), dtype=np.float32)}, "features must be float32"),
        ({"features": np.full((5, 60), np.nan, dtype=np.float32)}, "NaN"),
    ],
)
def test_damaged_own_files_are_refused(own: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StatisticsError, match=words):
        load_reference(_tampered(own, **changes), PIXELS)


def test_files_of_another_kind_are_refused(tmp_path: Path, own: Path) -> None:
    with pytest.raises(StatisticsError, match="does not exist"):
        load_reference(tmp_path / "missing.npz", PIXELS)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(own.read_bytes()[:2000])
    np.save(tmp_path / "array.npy", np.ones(3))
    for name in ("text.npz", "empty.npz", "cut.npz", "array.npy"):
        with pytest.raises(StatisticsError, match=r"not an npz|is empty") as caught:
            load_reference(tmp_path / name, PIXELS)
        assert "\n" not in str(caught.value)


def test_bad_folders_are_refused(tmp_path: Path, images: Tensor) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(StatisticsError, match="holds no images"):
        load_reference(empty, PIXELS)
    folder = _write_png(tmp_path / "images", images[:3])
    Image.fromarray(np.zeros((8, 9, 3), dtype=np.uint8)).save(folder / "other.png")
    with pytest.raises(StatisticsError, match=r"other\.png is 9x8, 000\.png is 5x4, .*of one size"):
        load_reference(folder, PIXELS)
    (folder / "other.png").write_bytes(b"not an image")
    with pytest.raises(StatisticsError, match="not a readable image"):
        load_reference(folder, PIXELS)
    Image.fromarray(np.zeros((4, 5), dtype=np.int32)).save(folder / "other.png", "TIFF")
    with pytest.raises(StatisticsError, match="8 or 16 bits"):
        load_reference(folder, PIXELS)


def test_images_of_several_sizes_are_one_reference_where_the_extractor_resizes(tmp_path: Path, images: Tensor) -> None:
    """Photographs: of many sizes, and some of them grey. Each must meet the network as it would alone."""

    def network(batch: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(batch.float(), (2, 2), mode="area").flatten(1)

    extractor = replace(INCEPTION, dim=12, network=network, seen=lambda height, width: 2)
    folder = _write_png(tmp_path / "images", images[:6])
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    wide = torch.randint(256, (3, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(grey).save(folder / "000_grey.png")
    Image.fromarray(wide.permute(1, 2, 0).numpy()).save(folder / "003_wide.png")
    alone = [images[:6], torch.from_numpy(grey).expand(1, 3, 8, 8), wide.unsqueeze(0)]
    expected = torch.cat([network(part) for part in alone])
    reference = load_reference(folder, extractor)
    assert reference.features is not None
    assert torch.equal(reference.features, expected)
    assert (reference.n, reference.channels, reference.size) == (8, 3, (4, 5))
    torch.testing.assert_close(reference.mu, expected.double().mean(0))
    sees_their_sizes = replace(extractor, seen=lambda height, width: max(height, width))
    with pytest.raises(StatisticsError, match="sees them in several sizes; give images of one size"):
        load_reference(folder, sees_their_sizes)


def test_published_extractors_say_what_they_resize_to() -> None:
    assert load_extractor("pixels", "cpu").seen is None
    seen = load_extractor("efficientnet-lite0", "cpu").seen
    assert seen is not None
    assert (seen(480, 640), seen(300, 240), seen(32, 32)) == (224, 224, 64)


def test_adm_statistics_know_their_channels(tmp_path: Path) -> None:
    """Else a model of grey images is scored against a dataset of colour ones without a word."""
    path = tmp_path / "VIRTUAL_colour.npz"
    moments = {"mu": np.ones(4), "sigma": np.eye(4), "mu_s": np.ones(4), "sigma_s": np.eye(4)}
    np.savez(path, **moments, arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    reference = load_reference(path, replace(INCEPTION, mode="legacy_tensorflow"))
    assert reference.n is None
    with pytest.raises(
        StatisticsError, match=r"images have 1 channel\(s\), those of reference 'VIRTUAL_colour' have 3"
    ):
        check_images(reference, (1, 8, 8))


def test_images_without_variety_are_refused() -> None:
    same = torch.full((5, 3, 4, 5), 77, dtype=torch.uint8)
    with pytest.raises(StatisticsError, match="'same': its images all have the same features"):
        build_reference(same, PIXELS, "same")


def test_images_must_suit_the_extractor(images: Tensor) -> None:
    with pytest.raises(StatisticsError, match="extractor 'digits'"):
        build_reference(images, load_extractor("digits", "cpu"), "noise")
    with pytest.raises(StatisticsError, match="at least 2"):
        build_reference(images[:1], PIXELS, "noise")
