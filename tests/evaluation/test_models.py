from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.models import DIGITS, MODELS, find_device, load_model
from autodiffusion_optuna.evaluation.models.diffusers_folder import WEIGHTS, load_folder
from autodiffusion_optuna.evaluation.models.mixture import default_mixture, mixture_model
from autodiffusion_optuna.evaluation.solvers import SOLVERS, times

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def pipeline(tmp_path: Path, make_unet: Callable[..., nn.Module]) -> Path:
    """A folder as a DDPM pipeline is saved."""
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path / "tiny"
    DDPMPipeline(unet=make_unet(), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def flat(tmp_path: Path, make_unet: Callable[..., nn.Module]) -> Path:
    """The network and its scheduler's config side by side."""
    from diffusers import DDPMScheduler

    folder = tmp_path / "flat"
    network: Any = make_unet()
    network.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    return folder


def refused(folder: Path) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_pipeline_folder_is_the_network_it_was_saved_from(
    pipeline: Path, make_unet: Callable[..., nn.Module]
) -> None:
    model = load_model(str(pipeline))
    with torch.inference_mode():
        eps = make_unet()(X, torch.tensor(300), return_dict=False)[0]
    alpha, sigma = model.schedule.alpha(300), model.schedule.sigma(300)
    torch.testing.assert_close(model.denoiser(X, 300, 0), (X - sigma * eps) / alpha)
    assert (model.name, model.shape, model.schedule.T, len(model.units)) == ("tiny", (1, 8, 8), 1000, 12)
    assert model.units[0] == "down_blocks.0.resnets.0"
    assert not torch.equal(model.denoiser(X, 300, 1), model.denoiser(X, 300, 0))


def test_a_flat_folder_is_the_same_model(pipeline: Path, flat: Path) -> None:
    first, second = load_model(str(pipeline)), load_model(str(flat))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.denoiser(X, 40, 0), second.denoiser(X, 40, 0))
    (flat / "scheduler").mkdir()
    shutil.move(flat / "scheduler_config.json", flat / "scheduler")
    assert load_model(str(flat)).fingerprint == first.fingerprint


def test_the_fingerprint_tells_weights_and_configs_apart(flat: Path) -> None:
    seen = {load_model(str(flat)).fingerprint}
    edit(flat / "scheduler_config.json", beta_end=0.03)
    seen.add(load_model(str(flat)).fingerprint)
    weights = load_file(flat / WEIGHTS)
    save_file({**weights, "conv_out.bias": weights["conv_out.bias"] + 1}, flat / WEIGHTS)
    seen.add(load_model(str(flat)).fingerprint)
    assert len(seen) == 3
    before = load_model(str(flat)).fingerprint
    edit(flat / "config.json", _diffusers_version="9.9", _name_or_path="elsewhere")
    assert load_model(str(flat), precision="bfloat16", clip=True).fingerprint == before


def test_prediction_type_comes_from_the_scheduler(flat: Path) -> None:
    plain = load_model(str(flat)).denoiser(X, 500, 0)
    edit(flat / "scheduler_config.json", prediction_type="sample")
    assert not torch.allclose(load_model(str(flat)).denoiser(X, 500, 0), plain)


def test_old_names_of_attention_weights_are_read(flat: Path) -> None:
    expected = load_model(str(flat)).denoiser(X, 500, 0)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(flat / WEIGHTS)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any(".query." in key for key in weights)
    save_file(weights, flat / WEIGHTS)
    assert torch.equal(load_model(str(flat)).denoiser(X, 500, 0), expected)


def test_flow_matching_networks_predict_velocity(flat: Path, make_unet: Callable[..., nn.Module]) -> None:
    (flat / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    model = load_model(str(flat))
    sigma = model.schedule.sigma(400)
    with torch.inference_mode():
        velocity = make_unet()(X, torch.tensor(1000 * sigma), return_dict=False)[0]
    torch.testing.assert_close(model.denoiser(X, 400, 0), X - sigma * velocity)


def test_a_learned_variance_is_dropped(tmp_path: Path, make_unet: Callable[..., nn.Module]) -> None:
    from diffusers import DDPMScheduler

    network: Any = make_unet(out_channels=2)
    network.save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).denoiser(X, 500, 0).shape == X.shape


def test_costs_are_macs_an_image_or_seconds_a_batch(flat: Path) -> None:
    model = load_model(str(flat))
    counted = model.costs("macs")
    assert counted.full > 0
    assert len(counted.shares) == 12
    assert model.costs("macs", batch=7) is counted
    measured = model.costs("latency", batch=2)
    assert measured.kind == "latency"
    assert measured.full > 0
    assert all(0 <= share <= 1 for share in measured.shares)
    with pytest.raises(ConfigError, match="unknown cost"):
        model.costs("flops")  # type: ignore[arg-type]


def test_images_are_clamped_and_rounded(flat: Path) -> None:
    x = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.5, 1.0, 9.0])
    images = load_model("mixture").to_images(x)
    assert images.dtype == torch.uint8
    assert images.tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_missing_parts_are_named(tmp_path: Path, pipeline: Path) -> None:
    assert "Known: digits, mixture, or the path of a diffusers folder" in refused(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"unknown model 'digit'; did you mean 'digits'"):
        load_model("digit")
    with pytest.raises(ModelError, match="no such folder"):
        load_folder(tmp_path / "nowhere")
    shutil.rmtree(pipeline / "scheduler")
    assert "looked for scheduler_config.json and scheduler/scheduler_config.json" in refused(pipeline)
    (pipeline / "unet" / WEIGHTS).rename(pipeline / "unet" / "diffusion_pytorch_model.bin")
    assert f"holds diffusion_pytorch_model.bin, but only {WEIGHTS} is read" in refused(pipeline)
    (pipeline / "unet" / "diffusion_pytorch_model.bin").unlink()
    assert f"no {WEIGHTS}" in refused(pipeline)
    (pipeline / "unet" / "config.json").unlink()
    assert "no config.json" in refused(pipeline)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel; only UNet2DModel"),
        ({"num_class_embeds": 10}, "class-conditional"),
        ({"class_embed_type": "timestep"}, "class-conditional"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": 7}, "does not run on [1, 7, 7] images"),
        ({"out_channels": 3}, "1 channels in and 3 out"),
        ({"block_out_channels": [8, 24]}, "has shape [16] instead of [24]"),
        ({"add_attention": False}, "weights do not fit config.json, 10 unexpected"),
        ({"layers_per_block": "two"}, "diffusers cannot build this model"),
        ({"down_block_types": ["Nonsense", "DownBlock2D"]}, "diffusers cannot build this model"),
    ],
)
def test_networks_that_do_not_fit_are_refused_in_one_line(flat: Path, changes: dict[str, Any], reason: str) -> None:
    edit(flat / "config.json", **changes)
    assert reason in refused(flat)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"prediction_type": "x0"}, "unknown prediction_type 'x0'"),
        ({"beta_end": 3.0}, "alphas_cumprod must"),
        ({"beta_end": "large"}, "could not convert"),
    ],
)
def test_schedules_that_do_not_work_are_refused(flat: Path, changes: dict[str, Any], reason: str) -> None:
    edit(flat / "scheduler_config.json", **changes)
    assert reason in refused(flat)


def test_a_scheduler_without_betas_is_refused(flat: Path) -> None:
    (flat / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler", "sigma_max": 80}')
    assert "EDMEulerScheduler has no betas" in refused(flat)


def test_damaged_files_are_refused(flat: Path) -> None:
    weights = (flat / WEIGHTS).read_bytes()
    for length in (len(weights) // 2, 100, 0):
        (flat / WEIGHTS).write_bytes(weights[:length])
        assert "damaged or cut short" in refused(flat)
    for text in ("{", "[]"):
        (flat / "config.json").write_text(text)
        assert "config.json" in refused(flat)


def test_missing_weights_are_not_filled_with_random_ones(flat: Path) -> None:
    weights = load_file(flat / WEIGHTS)
    save_file({key: value for key, value in weights.items() if key != "conv_in.weight"}, flat / WEIGHTS)
    assert "1 missing, first 'conv_in.weight'" in refused(flat)


def test_latent_pipelines_are_refused(pipeline: Path) -> None:
    edit(pipeline / "model_index.json", vqvae=["diffusers", "VQModel"])
    assert "latent models are not supported" in refused(pipeline)


def test_devices_and_settings_are_checked(flat: Path) -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ModelError, match=rf"device '{device}' does not exist here; use one of: auto, cpu"):
            load_model("mixture", device=device)
    with pytest.raises(ConfigError, match="unknown precision"):
        load_model(str(flat), precision="float8")


def test_the_mixture_is_sampled_exactly_enough() -> None:
    """Heun over every index of a 100-point grid reproduces the mixture's mean and spread."""
    model, mixture = mixture_model(T=100), default_mixture()
    noise = torch.randn(3000, *model.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nodes = times(model.schedule, range(99, -1, -1), "one")
    x = SOLVERS["heun"](lambda x, t: model.denoiser(x, t, 0), noise, nodes).flatten(1)
    assert (x.abs() < 1.2).all()
    mean, covariance = torch.from_numpy(mixture.mean()), torch.from_numpy(mixture.covariance())
    assert (x.mean(0) - mean).norm() < 0.05
    assert (torch.cov(x.T) - covariance).norm() / covariance.norm() < 0.05


def test_samples_of_the_mixture_have_its_moments() -> None:
    mixture = default_mixture()
    x = mixture.sample(50_000, seed=3)
    assert torch.equal(x, mixture.sample(50_000, seed=3))
    assert (x.abs() > 1).double().mean() < 0.01
    mean, covariance = torch.from_numpy(mixture.mean()), torch.from_numpy(mixture.covariance())
    assert (x.mean(0) - mean).norm() < 0.02
    assert (torch.cov(x.T) - covariance).norm() / covariance.norm() < 0.02


def test_the_mixture_as_a_model() -> None:
    model = load_model("mixture")
    assert (model.shape, model.units, model.schedule.T) == ((1, 4, 4), (), 1000)
    assert mixture_model(T=40).schedule.T == 40
    assert mixture_model(T=40).fingerprint != model.fingerprint == load_model("mixture", clip=True).fingerprint
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert model.denoiser(x.double(), 40.5, 0).dtype == torch.float64
    assert load_model("mixture", clip=True).denoiser(5 * x, 1, 0).abs().max() <= 1
    assert model.costs("macs").shares == ()
    with pytest.raises(ModelError, match="no units"):
        model.denoiser(x, 40, 1)
    with pytest.raises(ConfigError):
        mixture_model(T=20)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_built_in_models_load_and_denoise(name: str) -> None:
    if name == "digits" and not (DIGITS / "unet").is_dir():
        pytest.skip("the bundled weights are not in this checkout")
    model = load_model(name)
    assert model.name == name
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    assert model.denoiser(x, model.schedule.T - 1, 0).isfinite().all()
