from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from load_source import load_source
from safetensors.torch import load_file, save_file
from tiny_models import make_vae, write_class_conditional, write_ddpm
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.models import MODELS, find_device
from autodiffusion_optuna.evaluation.models.checkpoints import WEIGHTS
from autodiffusion_optuna.evaluation.models.mixture import GaussianMixture, default_mixture, mixture_model
from autodiffusion_optuna.evaluation.solvers import SOLVERS, times
from autodiffusion_optuna.evaluation.units import Branches

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
        load_source(folder, clip=False)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_pipeline_folder_is_the_network_it_was_saved_from(
    pipeline: Path, make_unet: Callable[..., nn.Module]
) -> None:
    model = load_source(pipeline, clip=False)
    with torch.inference_mode():
        eps = make_unet()(X, torch.tensor(300), return_dict=False)[0]
    alpha, sigma = model.schedule.alpha(300), model.schedule.sigma(300)
    torch.testing.assert_close(model.denoiser(X, 300, 0), (X - sigma * eps) / alpha)
    assert (model.name, model.shape, model.schedule.T, len(model.units)) == ("tiny", (1, 8, 8), 1000, 12)
    assert model.units[0] == "down_blocks.0.resnets.0"
    assert not torch.equal(model.denoiser(X, 300, 1), model.denoiser(X, 300, 0))


def test_a_flat_folder_is_the_same_model(pipeline: Path, flat: Path) -> None:
    first, second = load_source(pipeline, clip=False), load_source(flat, clip=False)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.denoiser(X, 40, 0), second.denoiser(X, 40, 0))
    (flat / "scheduler").mkdir()
    shutil.move(flat / "scheduler_config.json", flat / "scheduler")
    assert load_source(flat, clip=False).fingerprint == first.fingerprint


def test_the_fingerprint_tells_weights_and_configs_apart(flat: Path) -> None:
    seen = {load_source(flat, clip=False).fingerprint}
    edit(flat / "scheduler_config.json", beta_end=0.03)
    seen.add(load_source(flat, clip=False).fingerprint)
    weights = load_file(flat / WEIGHTS)
    save_file({**weights, "conv_out.bias": weights["conv_out.bias"] + 1}, flat / WEIGHTS)
    seen.add(load_source(flat, clip=False).fingerprint)
    assert len(seen) == 3
    before = load_source(flat, clip=False).fingerprint
    edit(flat / "config.json", _diffusers_version="9.9", _name_or_path="elsewhere")
    assert load_source(flat, precision="bfloat16").fingerprint == before


def test_prediction_type_comes_from_the_scheduler(flat: Path) -> None:
    plain = load_source(flat, clip=False).denoiser(X, 500, 0)
    edit(flat / "scheduler_config.json", prediction_type="sample")
    assert not torch.allclose(load_source(flat, clip=False).denoiser(X, 500, 0), plain)


def test_old_names_of_attention_weights_are_read(flat: Path) -> None:
    expected = load_source(flat, clip=False).denoiser(X, 500, 0)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(flat / WEIGHTS)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any(".query." in key for key in weights)
    save_file(weights, flat / WEIGHTS)
    assert torch.equal(load_source(flat, clip=False).denoiser(X, 500, 0), expected)


def test_flow_matching_networks_predict_velocity(flat: Path, make_unet: Callable[..., nn.Module]) -> None:
    (flat / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    model = load_source(flat, clip=False)
    sigma = model.schedule.sigma(400)
    with torch.inference_mode():
        velocity = make_unet()(X, torch.tensor(1000 * sigma), return_dict=False)[0]
    torch.testing.assert_close(model.denoiser(X, 400, 0), X - sigma * velocity)


def test_a_learned_variance_is_dropped(tmp_path: Path, make_unet: Callable[..., nn.Module]) -> None:
    from diffusers import DDPMScheduler

    network: Any = make_unet(out_channels=2)
    network.save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    assert load_source(tmp_path, clip=False).denoiser(X, 500, 0).shape == X.shape


def test_costs_are_macs_an_image_or_seconds_a_batch(flat: Path) -> None:
    model = load_source(flat, clip=False)
    counted = model.costs("macs")
    assert counted.full > 0
    assert len(counted.shares) == 12
    assert model.costs("macs", batch=7) == counted
    measured = model.costs("latency", batch=2)
    assert measured.full > 0
    assert all(0 <= share <= 1 for share in measured.shares)


def test_costs_are_those_of_a_batch_that_fits(flat: Path) -> None:
    model, seen = load_source(flat, clip=False), []

    def denoise(x: torch.Tensor, t: float, modes: int, branches: Branches | None = None) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError
        seen.append(len(x))
        return model.denoiser(x, t, modes, branches)

    assert replace(model, denoiser=denoise).costs("latency", 8).full > 0
    assert set(seen) == {2}

    def full(x: torch.Tensor, t: float, modes: int, branches: Branches | None = None) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(ModelError, match="out of memory with a single image"):
        replace(model, denoiser=full).costs("latency", 8)


def test_a_model_too_large_for_the_device_is_one_line(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: nn.Module, *args: object) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "to", full)
    monkeypatch.setattr("diffusers.UNet2DModel.to", full)
    with pytest.raises(ModelError, match="the device has too little memory for this model"):
        load_source(flat, clip=False)


def test_images_are_clamped_and_rounded(flat: Path) -> None:
    x = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.5, 1.0, 9.0])
    images = load_source("mixture", clip=False).to_images(x)
    assert images.dtype == torch.uint8
    assert images.tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_missing_parts_are_named(tmp_path: Path, pipeline: Path) -> None:
    assert "Known: digits, faces, mixture" in refused(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"unknown model 'digit'; did you mean 'digits'"):
        load_source("digit", clip=False)
    shutil.rmtree(pipeline / "scheduler")
    assert "looked for scheduler_config.json and scheduler/scheduler_config.json" in refused(pipeline)
    (pipeline / "unet" / WEIGHTS).rename(pipeline / "unet" / "diffusion_pytorch_model.onnx")
    assert f"no {WEIGHTS} (it holds diffusion_pytorch_model.onnx)" in refused(pipeline)
    (pipeline / "unet" / "diffusion_pytorch_model.onnx").unlink()
    assert f"no {WEIGHTS}; give a folder" in refused(pipeline)
    (pipeline / "unet" / "config.json").unlink()
    assert "no config.json" in refused(pipeline)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel; only UNet2DModel"),
        ({"num_class_embeds": 10}, "1 missing, first 'class_embedding.weight'"),
        ({"num_class_embeds": "ten"}, "num_class_embeds is 'ten'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; only class labels"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": 7}, "does not run on states of [1, 7, 7]"),
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
        ({"beta_end": "large"}, "beta_end is 'large'; give a number"),
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


def test_the_pipeline_is_sampled_as_diffusers_does(tmp_path: Path) -> None:
    """DDIM on an uneven list is diffusers' DPM-Solver++ of order 1 (arXiv 2211.01095, section 4)."""
    from diffusers import DPMSolverMultistepScheduler

    network = write_ddpm(tmp_path)
    steps = [981, 600, 555, 200, 41]
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=steps)
    x = noise
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    model = load_source(tmp_path, clip=False)
    sampled = sample(model, noise, steps)
    assert torch.equal(sampled, sample(model, noise, steps))
    torch.testing.assert_close(sampled, x, rtol=1e-5, atol=1e-5)


def sample(model: Any, noise: Tensor, steps: list[int]) -> Tensor:
    return SOLVERS["ddim"](lambda x, t: model.denoiser(x, t, 0), noise, times(model.schedule, steps, "zero"))


def test_pixels_are_clipped_unless_the_study_says_no(tmp_path: Path) -> None:
    write_ddpm(tmp_path)
    x = 9 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert load_source(tmp_path).denoiser(x, 900, 0).abs().max() == 1
    assert load_source(tmp_path, clip=False).denoiser(x, 900, 0).abs().max() > 1


def test_classes_condition_the_network(tmp_path: Path) -> None:
    network = write_class_conditional(tmp_path, classes=5)
    model = load_source(tmp_path, clip=False)
    assert model.conditions is not None
    assert (model.conditions.kind, model.conditions.count, model.guidance) == ("labels", 5, "none")
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = [4, 0, 2]
    with torch.inference_mode():
        eps = network(x, torch.tensor(300), class_labels=torch.tensor(labels)).sample
    expected = (x - model.schedule.sigma(300) * eps) / model.schedule.alpha(300)
    denoise = model.bind(labels)
    torch.testing.assert_close(denoise(x, 300, 0), expected)
    assert not torch.allclose(model.bind([0, 0, 2])(x, 300, 0)[0], expected[0])
    assert torch.equal(denoise(x, 300, 0), denoise(x, 300, 0))
    assert not torch.equal(denoise(x, 300, 1), denoise(x, 300, 0))
    assert model.costs().full > 0


def test_a_null_class_allows_guidance(tmp_path: Path) -> None:
    network = write_class_conditional(tmp_path, classes=4)
    model = load_source(tmp_path, clip=False, fields={"null_class": 1})
    assert model.conditions is not None
    assert (model.conditions.count, model.guidance, model.scale) == (3, "free", 1.0)
    assert model.conditions.rows([0, 1, 2])["label"].tolist() == [0, 2, 3]
    none = load_source(tmp_path, fields={"null_class": False})
    plain = load_source(tmp_path)
    assert none.conditions is not None
    assert (none.conditions.count, none.notes) == (4, ())
    assert "model.fields.null_class" in plain.notes[0]
    assert plain.conditions is not None
    assert plain.conditions.fingerprint != model.conditions.fingerprint
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        towards, away = (network(x, 300, class_labels=torch.tensor(y)).sample for y in ([2, 3], [1, 1]))
    eps = away + 2.5 * (towards - away)
    expected = (x - model.schedule.sigma(300) * eps) / model.schedule.alpha(300)
    torch.testing.assert_close(model.bind([1, 2], 2.5)(x, 300, 0), expected)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fields": {"null_class": 9}}, r"null_class = 9 is no class of .*; use an integer in \[0, 4\]"),
        ({"fields": {"nul_class": 1}}, "field 'nul_class' is not for models such as"),
        ({"preset": "imagenet64"}, "preset = 'imagenet64' is not for models such as"),
        ({"prompts": "prompts.txt"}, "leave model.prompts out"),
        ({"size": [64, 64]}, "leave model.size out"),
    ],
)
def test_settings_of_other_kinds_of_models_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    write_class_conditional(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        load_source(tmp_path, **settings)


def test_guidance_of_a_model_without_is_refused(tmp_path: Path) -> None:
    write_class_conditional(tmp_path)
    with pytest.raises(ConfigError, match=r"guidance 2 was given, but model .* has none"):
        load_source(tmp_path).check_scale(2.0)


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]},
        {"_class_name": "LatentConsistencyModelPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
    ],
)
def test_pipelines_of_other_networks_are_named(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    with pytest.raises(ModelError, match=rf"is a {index['_class_name']} with a .*; supported are StableDiffusion"):
        load_source(tmp_path, clip=False)


def test_an_unconditional_model_has_no_null_class(flat: Path) -> None:
    with pytest.raises(ConfigError, match=r"fields = .* is not for models such as 'flat'"):
        load_source(flat, fields={"null_class": 0})
    with pytest.raises(ConfigError, match="guidance 0 was given"):
        load_source(flat).bind([0], 0.0)


def test_every_format_of_weights_is_the_same_model(flat: Path) -> None:
    expected = load_source(flat).denoiser(X, 300, 0)
    weights = load_file(flat / WEIGHTS)
    (flat / WEIGHTS).unlink()
    names = sorted(weights)
    halves = {"1-of-2": names[::2], "2-of-2": names[1::2]}

    def load_once() -> Tensor:
        output = load_source(flat).denoiser(X, 300, 0)
        for path in flat.glob("diffusion_pytorch_model*"):
            path.unlink()
        return output

    torch.save(weights, flat / "diffusion_pytorch_model.bin")
    assert torch.equal(load_once(), expected)

    shards = {key: f"diffusion_pytorch_model-0000{half}.safetensors" for half in halves for key in halves[half]}
    (flat / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))
    for half, keys in halves.items():
        save_file({key: weights[key] for key in keys}, flat / f"diffusion_pytorch_model-0000{half}.safetensors")
    assert torch.equal(load_once(), expected)

    reduced = {key: value.half() for key, value in weights.items()}
    save_file(reduced, flat / "diffusion_pytorch_model.fp16.safetensors")
    torch.testing.assert_close(load_once(), expected, rtol=0, atol=1e-2)

    save_file(reduced, flat / "diffusion_pytorch_model.fp16.safetensors")
    save_file(weights, flat / WEIGHTS)
    assert torch.equal(load_once(), expected)


def test_incomplete_shards_are_refused(flat: Path) -> None:
    (flat / WEIGHTS).unlink()
    index = flat / f"{WEIGHTS}.index.json"
    index.write_text('{"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}')
    assert "names diffusion_pytorch_model-00001-of-00002.safetensors, which is not there" in refused(flat)
    index.write_text("{}")
    assert "has no weight_map" in refused(flat)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm-was-done"),)


def test_pickles_that_hold_code_are_refused(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (flat / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Harmful()}, flat / "diffusion_pytorch_model.bin")
    assert "which is code and not run" in refused(flat)
    assert not Path("harm-was-done").exists()
    torch.save([1, 2], flat / "diffusion_pytorch_model.bin")
    assert "not tensors by name" in refused(flat)
    for rest in (b"", b"not a pickle", b"PK"):
        (flat / "diffusion_pytorch_model.bin").write_bytes(rest)
        assert "damaged" in refused(flat)


def test_reduced_weights_predict_the_same(tmp_path: Path) -> None:
    write_class_conditional(tmp_path)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, reduced = load_source(tmp_path), load_source(tmp_path, precision="bfloat16")
    rounding = replace(plain, denoiser=replace(plain.denoiser, precision="bfloat16"))  # at every evaluation
    assert torch.equal(rounding.bind([0, 3])(x, 300, 0), reduced.bind([0, 3])(x, 300, 0))
    assert plain.fingerprint == reduced.fingerprint


def test_latent_unconditional_pipelines(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, LDMPipeline, VQModel
    from tiny_models import make_unet

    vqvae = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
    )
    for name, decoder, channels in (("vqvae", vqvae, 3), ("kl", make_vae(), 4)):
        folder = tmp_path / name
        network = make_unet(sample_size=8, in_channels=channels, out_channels=channels)
        pipeline = LDMPipeline(vqvae=decoder, unet=network, scheduler=DDIMScheduler())
        pipeline.save_pretrained(folder)
        model = load_source(folder)
        assert (model.shape, model.picture_shape, model.kind) == ((channels, 8, 8), (3, 16, 16), "LDMPipeline")
        z = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
        assert model.denoiser(9 * z, 900, 0).abs().max() > 1
        assert model.decode is not None
        with torch.inference_mode():
            images = decoder.eval().decode(z / decoder.config.scaling_factor).sample
        torch.testing.assert_close(model.decode(z), images, rtol=1e-4, atol=1e-4)
        assert model.to_images(z).shape == (2, 3, 16, 16)
        with pytest.raises(ConfigError, match="are latents, which go beyond"):
            load_source(folder, clip=True)
    edit(tmp_path / "kl" / "vqvae" / "config.json", scaling_factor=1.0)
    assert load_source(tmp_path / "kl").fingerprint != model.fingerprint
    shutil.rmtree(tmp_path / "kl" / "vqvae")
    assert "no config.json" in refused(tmp_path / "kl")


def test_devices_and_settings_are_checked(flat: Path) -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ModelError, match=rf"device '{device}' does not exist here; use one of: auto, cpu"):
            load_source("mixture", device=device)


def moments(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Exact mean float64 [D] and covariance float64 [D, D]."""
    mean = mixture.weights @ mixture.means
    centred = mixture.means - mean
    between = (mixture.weights[:, None] * centred).T @ centred
    return mean, between + (mixture.weights @ mixture.stds**2) * torch.eye(len(mean), dtype=torch.float64)


def test_the_mixture_is_sampled_exactly_enough() -> None:
    """Heun over every index of a 100-point grid reproduces the mixture's mean and spread."""
    model, mixture = mixture_model(T=100), default_mixture()
    noise = torch.randn(3000, *model.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nodes = times(model.schedule, range(99, -1, -1), "zero")
    x = SOLVERS["heun"](lambda x, t: model.denoiser(x, t, 0), noise, nodes).flatten(1)
    assert (x.abs() < 1.2).all()
    mean, covariance = moments(mixture)
    assert (x.mean(0) - mean).norm() < 0.05
    assert (torch.cov(x.T) - covariance).norm() / covariance.norm() < 0.05


def test_samples_of_the_mixture_have_its_moments() -> None:
    mixture = default_mixture()
    x = mixture.sample(50_000, seed=3)
    assert torch.equal(x, mixture.sample(50_000, seed=3))
    assert (x.abs() > 1).double().mean() < 0.01
    mean, covariance = moments(mixture)
    assert (x.mean(0) - mean).norm() < 0.02
    assert (torch.cov(x.T) - covariance).norm() / covariance.norm() < 0.02


def test_the_mixture_as_a_model() -> None:
    model = load_source("mixture", clip=False)
    assert (model.shape, model.units, model.schedule.T) == ((1, 4, 4), (), 1000)
    assert mixture_model(T=40).schedule.T == 40
    assert mixture_model(T=40).fingerprint != model.fingerprint == load_source("mixture").fingerprint
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert model.denoiser(x.double(), 40.5, 0).dtype == torch.float64
    assert load_source("mixture").denoiser(5 * x, 1, 0).abs().max() <= 1
    assert model.costs("macs").shares == ()
    with pytest.raises(ModelError, match="no units"):
        model.denoiser(x, 40, 1)
    with pytest.raises(ConfigError):
        mixture_model(T=20)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_built_in_models_load_and_denoise(name: str) -> None:
    model = load_source(name)
    assert model.name == name
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    assert model.denoiser(x, model.schedule.T - 1, 0).isfinite().all()
