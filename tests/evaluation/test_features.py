import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError, StatisticsError
from autodiffusion_optuna.evaluation.features import (
    DIGITS_WEIGHTS,
    EXTRACTORS,
    load_extractor,
    resize_clean,
    usual_extractor,
)
from autodiffusion_optuna.evaluation.features.base import fingerprint
from autodiffusion_optuna.evaluation.features.bundled import DigitsNet

TESTS = Path(__file__).parent.parent
RESIZE = load_file(TESTS / "golden" / "resize.safetensors")
TOLERANCE = json.loads((TESTS / "golden" / "resize.json").read_text())["tolerance"]["accept"]


def test_what_is_usual_where_nobody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [usual_extractor(name, (3, 512, 512)) for name in ("digits", "faces", "mixture")] == [
        "digits",
        "faces",
        "pixels",
    ]
    found = "autodiffusion_optuna.evaluation.features.find_spec"
    monkeypatch.setattr(found, lambda package: package)
    assert usual_extractor("./digits", (3, 32, 32)) == "pixels"
    assert usual_extractor("model", (3, 32, 32), one_size=False) == "efficientnet-lite0"
    assert usual_extractor("model", (3, 64, 64)) == "efficientnet-lite0"
    assert usual_extractor("model", (1, 128, 128)) is None
    monkeypatch.setattr(found, lambda package: None)
    assert usual_extractor("model", (3, 64, 64)) is None


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The 1,000 digits that no network has seen: uint8 [1000, 1, 28, 28] and int64 [1000]."""
    with np.load(TESTS / "data" / "digits_heldout.npz", allow_pickle=False) as data:
        return torch.from_numpy(data["x"]).unsqueeze(1), torch.from_numpy(data["y"].astype(np.int64))


class _Stem(nn.Module):
    """The interface of the TorchScript Inception, with 2,048 features of a few pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, kernel_size=1, stride=299))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


@pytest.fixture
def inception_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "some_name.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_Stem()), path)
    return path


def _resized(name: str) -> Tensor:
    image = RESIZE[f"{name}.input"].permute(2, 0, 1)[None]
    return resize_clean(image)[0].permute(1, 2, 0)


@pytest.mark.parametrize("name", ["im32", "imrect"])
def test_resize_is_clean_fids(name: str) -> None:
    assert float((_resized(name) - RESIZE[f"{name}.clean"]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", ["im64", "im256"])
def test_resize_is_clean_fids_on_samples(name: str) -> None:
    resized = _resized(name)
    assert float((resized[::13, ::13] - RESIZE[f"{name}.clean_every_13th"]).abs().max()) <= TOLERANCE
    assert float((resized[-40:, -40:] - RESIZE[f"{name}.clean_corner_40"]).abs().max()) <= TOLERANCE


def test_bundled_extractor_reads_digits(digits: tuple[Tensor, Tensor]) -> None:
    net = DigitsNet().eval()
    net.load_state_dict(load_file(DIGITS_WEIGHTS))
    with torch.inference_mode():
        found = net(digits[0].float() / 255).argmax(1)
    assert float((found == digits[1]).float().mean()) >= 0.985


def test_digits_features(digits: tuple[Tensor, Tensor]) -> None:
    extractor = load_extractor("digits", "cpu")
    features = extractor(digits[0][:8])
    assert features.shape == (8, extractor.dim)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert extractor.metric == "FD"
    torch.testing.assert_close(torch.cat([extractor(digits[0][i : i + 1]) for i in range(8)]), features)


def test_pixels_are_flattened() -> None:
    images = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    extractor = load_extractor("pixels", "cpu")
    assert torch.equal(extractor(images), images.reshape(2, 48).float())
    with pytest.raises(StatisticsError, match="at most 4096"):
        extractor(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_inception_is_clean_fids_order_of_operations(inception_file: Path) -> None:
    extractor = load_extractor("inception", "cpu", inception_file, trust=True)
    images = torch.randint(256, (3, 1, 32, 32), dtype=torch.uint8)
    features = extractor(images)
    assert features.shape == (3, 2048)
    assert extractor.metric == "FID"
    assert torch.equal(features, extractor(images.expand(-1, 3, -1, -1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.load(inception_file)  # type: ignore[no-untyped-call]
    expected = net(((resize_clean(images) - 128) / 128).expand(-1, 3, -1, -1)).flatten(1)
    torch.testing.assert_close(features, expected)


def test_inception_needs_weights_and_trust(inception_file: Path) -> None:
    with pytest.raises(ConfigError, match="given no weights"):
        load_extractor("inception", "cpu", trust=True)
    with pytest.raises(ConfigError, match="pass --trust"):
        load_extractor("inception", "cpu", inception_file)
    with pytest.raises(ConfigError, match="not a file"):
        load_extractor("inception", "cpu", inception_file.with_name("missing.pt"), trust=True)


@pytest.mark.parametrize("name", ["inception", "digits"])
def test_unreadable_weights_are_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"not weights")
    with pytest.raises(ModelError) as caught:
        load_extractor(name, "cpu", path, trust=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchscript_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(ModelError, match="not the TorchScript Inception"):
        load_extractor("inception", "cpu", path, trust=True)


def test_pixels_take_no_weights(inception_file: Path) -> None:
    with pytest.raises(ConfigError, match="no weights"):
        load_extractor("pixels", "cpu", inception_file)


def test_unknown_extractor_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'inception'"):
        load_extractor("inceptoin", "cpu")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 28, 28),
        torch.zeros(2, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 4, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 3, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
    ],
    ids=["float", "3-D", "four channels", "colour", "size"],
)
def test_digits_refuse_other_images(images: Tensor) -> None:
    with pytest.raises(StatisticsError, match="extractor 'digits' was given images"):
        load_extractor("digits", "cpu")(images)


def test_fingerprints_differ_by_what_changes_features(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({name: value + 1 for name, value in load_file(DIGITS_WEIGHTS).items()}, other)
    bundled = load_extractor("digits", "cpu")
    assert load_extractor("digits", "cpu", DIGITS_WEIGHTS).fingerprint == bundled.fingerprint
    assert load_extractor("digits", "cpu", other).fingerprint != bundled.fingerprint
    facts = [("a", "clean", 299), ("b", "clean", 299), ("a", "none", 299), ("a", "clean", 64)]
    assert len({fingerprint(kind, None, resize, size) for kind, resize, size in facts}) == 4
    assert fingerprint("a", None, "clean", 299) == fingerprint("a", None, "clean", 299)


def test_every_extractor_has_a_loader() -> None:
    bundled, published = {"digits", "faces", "pixels"}, {"inception", "clip", "dinov2", "efficientnet-lite0"}
    assert set(EXTRACTORS) == bundled | published | {"torchscript", "python"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_agree_on_a_gpu(digits: tuple[Tensor, Tensor]) -> None:
    on_gpu = load_extractor("digits", "cuda")(digits[0].cuda())
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), load_extractor("digits", "cpu")(digits[0]), rtol=1e-4, atol=1e-4)
    image = RESIZE["im256.input"].permute(2, 0, 1)[None]
    assert float((resize_clean(image.cuda()).cpu() - resize_clean(image)).abs().max()) <= TOLERANCE
