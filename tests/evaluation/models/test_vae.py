from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_vae
from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.models.vae import SlicedDecode, load_vae

CPU = torch.device("cpu")
Z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def decoded(z: Tensor, **overrides: object) -> Tensor:
    with torch.inference_mode():
        images: Tensor = make_vae(**overrides).decode(z).sample
    return images


def test_latents_are_scaled_and_moved_before_they_are_decoded(tmp_path: Path) -> None:
    make_vae(scaling_factor=0.5, shift_factor=0.1).save_pretrained(tmp_path)
    vae = load_vae(tmp_path, CPU)
    assert (vae.channels, vae.factor) == (4, 2)
    images = vae.decode(Z)
    assert images.shape == (5, 3, 16, 16)
    torch.testing.assert_close(images, decoded(Z / 0.5 + 0.1))
    assert load_vae(tmp_path, CPU, "bfloat16", scaling=2.0).digest == vae.digest
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = load_vae(tmp_path, CPU, scaling=2.0)
    torch.testing.assert_close(other.decode(Z), decoded(Z / 2.0 + 0.1))
    assert other.digest != vae.digest


def test_latents_may_be_scaled_by_channel(tmp_path: Path) -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    make_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std).save_pretrained(tmp_path)
    expected = Z * torch.tensor(std)[:, None, None] / 0.5 + torch.tensor(mean)[:, None, None]
    torch.testing.assert_close(load_vae(tmp_path, CPU).decode(Z), decoded(expected))


def test_slices_do_not_change_images(tmp_path: Path) -> None:
    make_vae().save_pretrained(tmp_path)
    vae = load_vae(tmp_path, CPU)
    whole = vae.decode(Z)
    assert isinstance(vae.decode, SlicedDecode)
    vae.decode.pixels = 2 * 16 * 16
    torch.testing.assert_close(vae.decode(Z), whole)


def test_slices_shrink_where_memory_is_short() -> None:
    sizes: list[int] = []

    def decode(z: Tensor) -> Tensor:
        sizes.append(len(z))
        if len(z) > limit:
            raise torch.OutOfMemoryError
        return z + 1

    sliced = SlicedDecode(decode, factor=1)
    sliced.pixels, limit = 5 * 8 * 8, 2
    assert torch.equal(sliced(Z), Z + 1)
    assert sizes == [5, 2, 2, 1]
    sizes.clear()
    assert torch.equal(sliced(Z), Z + 1)
    assert sizes == [2, 2, 1]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        sliced(Z)


@pytest.mark.parametrize("upcast", [True, False])
def test_decoders_that_overflow_stay_in_float32(tmp_path: Path, upcast: bool) -> None:
    make_vae(force_upcast=upcast).save_pretrained(tmp_path)
    full, half, brain = (load_vae(tmp_path, CPU, name).decode(Z) for name in ("float32", "float16", "bfloat16"))
    assert torch.equal(full, half) == upcast
    assert not torch.equal(full, brain)
    assert half.dtype == brain.dtype == torch.float32
    torch.testing.assert_close(brain, full, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "AutoencoderTiny"}, "describes a AutoencoderTiny; only AutoencoderKL or VQModel"),
        ({"scaling_factor": 0}, "do not scale latents of 4 channels"),
        ({"scaling_factor": "half"}, "do not scale latents of 4 channels"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 2.0]}, "do not scale latents of 4 channels"),
        ({"latents_std": [1.0] * 4}, "latents_mean is None and latents_std [1.0, 1.0, 1.0, 1.0]; give both"),
        ({"latent_channels": 5}, "weights do not fit config.json"),
    ],
)
def test_decoders_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    make_vae().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ModelError) as caught:
        load_vae(tmp_path, CPU)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_decoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json; give a folder"):
        load_vae(tmp_path / "vae", CPU)
