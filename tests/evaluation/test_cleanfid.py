"""Our in-memory figures are those of clean-fid on the same images written as PNG."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from autodiffusion_optuna.config import Mode
from autodiffusion_optuna.evaluation.features import Extractor, load_extractor
from autodiffusion_optuna.evaluation.frechet import Moments, frechet_distance
from autodiffusion_optuna.evaluation.references.reference import Reference, load_reference

DIM = 48  # clean-fid's square root of a 2048 x 2048 matrix takes a minute: both sides are given these features alone


class _Layers(nn.Module):
    """2,048 non-negative features of 299 x 299 pixels, by random filters of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 1024, kernel_size=9, stride=58)
        self.coarse = nn.Conv2d(3, 1024, kernel_size=60, stride=110)

    def forward(self, x: Tensor) -> Tensor:
        both = [torch.relu(part).mean((2, 3)) for part in (self.fine(x), self.coarse(x))]
        return torch.cat(both, dim=1)


class Inception(nn.Module):
    """The interface of NVIDIA's TorchScript file: ``layers``, and a forward that resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(x.float(), [299, 299], mode="bilinear", align_corners=False)
        features: Tensor = self.layers((x - 128) / 128)
        return features if return_features else features[:, :8]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Inception()), path)
    return path


def smooth(count: int, shade: float, seed: int) -> Tensor:
    """Colour blobs uint8 [count, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255 * shade
    images = nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    return images.clamp(0, 255).round().to(torch.uint8)


def write(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:04}.png")
    return folder


def ours(extractor: Extractor, generated: Tensor, real: Tensor) -> float:
    moments = Moments.of(extractor(real)[:, :DIM])
    reference = Reference(moments.mean, moments.covariance, moments.n, "", "", "")
    return frechet_distance(extractor(generated)[:, :DIM], reference)


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_figure_is_clean_fids(weights: Path, tmp_path: Path, mode: Mode) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import fid
        from cleanfid.inception_torchscript import InceptionV3W

        (tmp_path / "net").mkdir()
        (tmp_path / "net" / "inception-2015-12-05.pt").write_bytes(weights.read_bytes())
        inside = mode == "legacy_tensorflow"
        net = InceptionV3W(str(tmp_path / "net"), download=False, resize_inside=inside)
    generated, real = smooth(80, 0.9, seed=1), smooth(90, 1.0, seed=2)
    folders = [write(tmp_path / name, images) for name, images in (("generated", generated), ("real", real))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = fid.compute_fid(
            *map(str, folders),
            mode=mode,
            custom_feat_extractor=lambda batch: net(batch)[:, :DIM],
            num_workers=0,
            batch_size=30,
            device=torch.device("cpu"),
            verbose=False,
            use_dataparallel=False,
        )
    extractor = load_extractor("inception", "cpu", weights, trust=True, mode=mode)
    value = ours(extractor, generated, real)
    print(f"{mode}: ours {value:.8g}, clean-fid {theirs:.8g}")
    assert value > 0
    assert value == pytest.approx(theirs, rel=1e-5)  # the modes themselves differ by 7e-4 here
    assert extractor.metric == "FID"


def test_folder_of_png_and_tensor_are_one_reference(weights: Path, tmp_path: Path) -> None:
    images = smooth(12, 1.0, seed=3)
    extractor = load_extractor("inception", "cpu", weights, trust=True)
    reference = load_reference(write(tmp_path / "real", images), extractor)
    assert reference.features is not None
    assert torch.equal(reference.features, extractor(images))
    assert (reference.channels, reference.size, len(reference.mu)) == (3, (32, 32), 2048)


def test_the_modes_differ_and_so_do_their_fingerprints(weights: Path) -> None:
    clean, unstated, tensorflow = (
        load_extractor("inception", "cpu", weights, trust=True, mode=mode)
        for mode in ("clean", None, "legacy_tensorflow")
    )
    assert clean.fingerprint == unstated.fingerprint != tensorflow.fingerprint
    images = smooth(4, 1.0, seed=4)
    assert torch.equal(clean(images), unstated(images))
    assert float((clean(images) - tensorflow(images)).abs().max()) > 1e-3


def test_legacy_pytorch_is_clean_fids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import inception_pytorch
        from cleanfid.features import build_feature_extractor
        from cleanfid.resize import build_resizer

        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            # A network of random weights, as the architecture is before it is given any.
            patch.setattr(inception_pytorch.torchvision.models.Inception3, "load_state_dict", lambda *_: None)
            patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {})
            state = inception_pytorch.fid_inception_v3().state_dict()
        path = tmp_path / "pt_inception.pth"
        torch.save(state, path)
        with monkeypatch.context() as patch:
            patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state)
            net = build_feature_extractor("legacy_pytorch", torch.device("cpu"), use_dataparallel=False)
        resize = build_resizer("legacy_pytorch")
        images = smooth(2, 1.0, seed=5)
        theirs = net(
            torch.stack([torch.from_numpy(resize(i.permute(1, 2, 0).numpy())).permute(2, 0, 1) for i in images])
        )
    downloads = inception_pytorch.load_state_dict_from_url
    extractor = load_extractor("inception", "cpu", path, mode="legacy_pytorch")
    assert inception_pytorch.load_state_dict_from_url is downloads
    torch.testing.assert_close(extractor(images), theirs, rtol=1e-4, atol=1e-6)
    assert float(theirs.std()) > 0
