"""adopt reference: build, show, weights."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from autodiffusion_optuna.cli.reference import reference_app
from autodiffusion_optuna.errors import AdoptError, ConfigError, StatisticsError
from autodiffusion_optuna.evaluation.features import DIGITS_WEIGHTS, load_extractor
from autodiffusion_optuna.evaluation.features.weights import PUBLISHED, Published
from autodiffusion_optuna.evaluation.references.reference import load_reference

DIGITS = DIGITS_WEIGHTS.with_name("reference.npz")


def adopt(*arguments: object) -> str:
    """What ``adopt reference ARGUMENTS`` prints on both streams; an AdoptError is raised as it is."""
    result = CliRunner().invoke(reference_app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def refused(words: str, *arguments: object) -> None:
    with pytest.raises(AdoptError, match=words) as caught:
        adopt(*arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve grey images of 5 x 4 pixels."""
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 5), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:02}.png")
    return tmp_path / "images"


def test_what_is_built_is_loaded(folder: Path, tmp_path: Path) -> None:
    printed = adopt(
        "build", "--images", folder, "--extractor", "pixels", "--device", "cpu", "--out", tmp_path / "my.npz"
    )
    assert "12 of 12 images" in printed
    assert "warning: 12 images for 20 features" in printed
    assert f"wrote {tmp_path / 'my.npz'}: 12 images, 20 features each" in printed
    reference = load_reference(tmp_path / "my.npz", load_extractor("pixels", "cpu"))
    assert (reference.n, reference.dataset, reference.channels, reference.size) == (12, "images", 1, (4, 5))
    shown = adopt("show", tmp_path / "my.npz")
    for text in ("a reference of adopt", "pixels", reference.fingerprint, "images", "12", "20", "5x4"):
        assert text in shown
    assert f"{float(reference.sigma.trace()):.6g}" in shown


def test_a_file_is_overwritten_by_force_only(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "my.npz"
    path.write_text("mine")
    arguments = ["build", "--images", folder, "--extractor", "pixels", "--device", "cpu", "--out", path]
    refused("exists; pass --force", *arguments)
    assert path.read_text() == "mine"
    adopt(*arguments, "--force")
    assert load_reference(path, load_extractor("pixels", "cpu")).n == 12


def test_mistakes_are_one_line_and_write_nothing(folder: Path, tmp_path: Path) -> None:
    base = ["build", "--images", folder, "--device", "cpu", "--out", tmp_path / "my.npz", "--extractor"]
    refused("did you mean 'pixels'", *base, "pixel")
    refused("it takes uint8", *base, "digits")
    refused("did you mean 'clean'", *base, "inception", "--mode", "cleen")
    refused("given no weights", *base, "inception")
    refused("device 'cuda:77'", *base, "pixels", "--device", "cuda:77")
    refused("folder .*no.* does not exist", *base, "pixels", "--out", tmp_path / "no" / "my.npz")
    refused("is a folder", *base, "pixels", "--out", folder)
    refused("does not exist", *base, "pixels", "--images", tmp_path / "none")
    refused("no images", *base, "digits", "--images", DIGITS)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "zz.png")
    refused("zz.png is 9x9, 00.png is 5x4", *base, "pixels")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_show_says_what_any_format_is(folder: Path, tmp_path: Path) -> None:
    moments = {"mu": np.ones(3), "sigma": np.eye(3) * 2}
    np.savez(tmp_path / "cifar10_legacy_tensorflow_train_32.npz", **moments)
    np.savez(tmp_path / "stats.npz", **moments)
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"num_images": 77, "fid": moments}))
    expected = {
        folder: ["a folder of images", "12", "5x4"],
        tmp_path / "cifar10_legacy_tensorflow_train_32.npz": ["clean-fid", "inception, mode legacy_tensorflow", "6"],
        tmp_path / "stats.npz": ["unknown make", "not said"],
        tmp_path / "edm2.pkl": ["EDM2", "inception, mode legacy_tensorflow", "77"],
        DIGITS: ["digits", "9,000", "64", "1,000 x 64"],
    }
    for path, texts in expected.items():
        shown = adopt("show", path)
        for text in texts:
            assert text in shown, (path, text)
    with pytest.raises(StatisticsError, match="does not exist"):
        adopt("show", tmp_path / "none.npz")


def test_show_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from autodiffusion_optuna.cli.reference import reference_app\n"
        f"reference_app(['show', {str(DIGITS)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'cleanfid', 'scipy', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_weights_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(PUBLISHED, "mine", Published((tmp_path / "source").as_uri(), digest, "extractor of tests"))
    path = tmp_path / "mine.pt"
    assert "wrote" in adopt("weights", "mine", "--out", path)
    assert path.read_bytes() == b"weights"
    assert "already there" in adopt("weights", "mine", "--out", path)
    refused("exists and is not weights", "weights", "mine", "--out", path, "--sha256", "0" * 64)
    with pytest.raises(ConfigError, match="did you mean 'inception'"):
        adopt("weights", "incepton", "--out", tmp_path / "a")
