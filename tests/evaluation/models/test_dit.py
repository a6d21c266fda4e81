from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from load_source import load_source
from tiny_models import write_dit
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.solvers import SOLVERS, times

STEPS = [981, 700, 655, 200, 41]
LABELS = [3, 7]
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pipeline(tmp_path: Path) -> Any:
    """A DiTPipeline, saved in ``tmp_path / "dit"``."""
    return write_dit(tmp_path / "dit")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def sample(model: Model, scale: float | None = None, labels: list[int] = LABELS) -> Tensor:
    denoise = model.bind(labels, scale)
    return SOLVERS["ddim"](lambda x, t: denoise(x, t, 0), NOISE, times(model.schedule, STEPS, "zero"))


@torch.inference_mode()
def reference(network: Any, scale: float, null: int = 10) -> Tensor:
    """DiTPipeline's loop with an uneven list of timesteps. Its own null class is 1000 whatever the network."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=STEPS)
    latents = NOISE
    labels = torch.tensor([*LABELS, null, null])
    for t in scheduler.timesteps:
        both = torch.cat([latents, latents])
        output = network(both, timestep=t[None].expand(4), class_labels=labels).sample
        towards, away = output[:, :4].chunk(2)
        latents = scheduler.step(away + scale * (towards - away), t, latents).prev_sample
    return latents


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_samples_equal_those_of_diffusers(pipeline: Any, tmp_path: Path, scale: float) -> None:
    model = load_source(tmp_path / "dit")
    expected = reference(pipeline.transformer, scale)
    sampled = sample(model, scale)
    difference = ((sampled - expected).abs().max() / expected.abs().max()).item()
    print(f"scale {scale}: largest difference {difference:.1e} of the largest latent")
    assert difference < 2e-6
    assert torch.equal(sampled, sample(model, scale))
    assert not torch.allclose(sampled, sample(model, scale, [3, 8]))


def test_images_equal_those_of_the_pipeline_itself(tmp_path: Path) -> None:
    """With ImageNet's 1000 classes, DiTPipeline can run as it is."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline = write_dit(tmp_path, num_embeds_ada_norm=1000)
    pipeline.scheduler = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(LABELS, guidance_scale=4.0, num_inference_steps=5, generator=generator, output_type="pt").images
    model = load_source(tmp_path)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoise = model.bind(LABELS)
    steps = pipeline.scheduler.timesteps.tolist()
    latents = SOLVERS["ddim"](lambda x, t: denoise(x, t, 0), noise, times(model.schedule, steps, "zero"))
    assert ((images > 0) & (images < 1)).float().mean() > 0.5
    expected = (images * 255).round().to(torch.uint8)
    assert (model.to_images(latents).int() - expected.int()).abs().max() <= 1


def test_the_model_says_what_it_is(pipeline: Any, tmp_path: Path) -> None:
    model = load_source(tmp_path / "dit")
    assert (model.name, model.kind, model.guidance, model.scale) == ("dit", "DiTPipeline", "free", 4.0)
    assert (model.shape, model.picture_shape) == ((4, 8, 8), (3, 16, 16))
    assert model.units == ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2")
    assert model.conditions is not None
    assert model.conditions.count == 10
    assert model.conditions.rows([9, 0])["label"].tolist() == [9, 0]
    assert model.conditions.negative is not None
    assert model.conditions.negative(2)["label"].tolist() == [10, 10]
    assert model.costs().full > 0
    assert len(model.costs().shares) == 3


def test_a_skipped_block_is_left_out(pipeline: Any, tmp_path: Path) -> None:
    model = load_source(tmp_path / "dit")
    network = pipeline.transformer
    blocks = network.transformer_blocks
    network.transformer_blocks = torch.nn.ModuleList([blocks[0], blocks[2]])
    with torch.inference_mode():
        eps = network(NOISE, torch.tensor([500]), class_labels=torch.tensor(LABELS)).sample[:, :4]
    expected = (NOISE - model.schedule.sigma(500) * eps) / model.schedule.alpha(500)
    denoise = model.bind(LABELS, 1.0)
    torch.testing.assert_close(denoise(NOISE, 500, 0b0100), expected)
    assert not torch.allclose(denoise(NOISE, 500, 0), expected)


def test_nothing_skipped_is_the_plain_network(pipeline: Any, tmp_path: Path) -> None:
    model = load_source(tmp_path / "dit")
    with torch.inference_mode():
        eps = pipeline.transformer(NOISE, torch.full((2,), 500.0), class_labels=torch.tensor(LABELS)).sample[:, :4]
        alpha, sigma = model.schedule.alpha(500), model.schedule.sigma(500)
        assert torch.equal(model.bind(LABELS, 1.0)(NOISE, 500, 0), 1 / alpha * NOISE + -sigma / alpha * eps)


def test_the_fingerprint_covers_every_part(pipeline: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    seen = [load_source(folder).fingerprint]
    assert load_source(folder, precision="bfloat16").fingerprint == seen[0]
    for part, change in (
        ("vae/config.json", {"scaling_factor": 0.3}),
        ("transformer/config.json", {"norm_eps": 1e-3}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.03}),
    ):
        edit(folder / part, **change)
        seen.append(load_source(folder).fingerprint)
    assert len(set(seen)) == 4


def test_reduced_weights_predict_the_same(pipeline: Any, tmp_path: Path) -> None:
    plain, reduced = load_source(tmp_path / "dit"), load_source(tmp_path / "dit", precision="bfloat16")
    rounding = replace(plain, denoiser=replace(plain.denoiser, precision="bfloat16"))  # at every evaluation
    assert torch.equal(rounding.bind(LABELS)(NOISE, 500, 0), reduced.bind(LABELS)(NOISE, 500, 0))


def test_older_names_of_the_class_are_read(pipeline: Any, tmp_path: Path) -> None:
    expected = sample(load_source(tmp_path / "dit"))
    config = tmp_path / "dit" / "transformer" / "config.json"
    edit(config, _class_name="Transformer2DModel", attention_type="default", cross_attention_dim=None)
    assert torch.equal(sample(load_source(tmp_path / "dit")), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "describes a PixArtTransformer2DModel; only DiTTransformer"),
        ({"norm_type": "ada_norm_single"}, "only a DiT is supported"),
        ({"in_channels": 3, "out_channels": 3}, "weights do not fit config.json"),
        ({"out_channels": 5}, "4 channels in and 5 out"),
        ({"num_embeds_ada_norm": 0}, "num_embeds_ada_norm is 0"),
        ({"sample_size": None}, "sample_size is None"),
        ({"patch_size": 0}, "diffusers cannot build this model"),
    ],
)
def test_networks_that_do_not_fit_are_refused_in_one_line(
    pipeline: Any, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    edit(tmp_path / "dit" / "transformer" / "config.json", **changes)
    with pytest.raises(ModelError) as caught:
        load_source(tmp_path / "dit")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_decoder_of_another_model_is_refused(pipeline: Any, tmp_path: Path) -> None:
    from tiny_models import make_vae

    make_vae(latent_channels=3).save_pretrained(tmp_path / "dit" / "vae")
    with pytest.raises(ModelError, match="states have 4 channels, but the decoder beside it takes 3"):
        load_source(tmp_path / "dit")


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_missing_and_damaged_parts_are_named(pipeline: Any, tmp_path: Path, part: str) -> None:
    weights = tmp_path / "dit" / part / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=rf"{part}.*damaged or cut short"):
        load_source(tmp_path / "dit")
    shutil.rmtree(tmp_path / "dit" / part)
    with pytest.raises(ModelError, match=rf"{part}: no config\.json"):
        load_source(tmp_path / "dit")


def test_latents_are_not_clipped(pipeline: Any, tmp_path: Path) -> None:
    for clip in (None, False):
        assert load_source(tmp_path / "dit", clip=clip).bind(LABELS)(5 * NOISE, 900, 0).abs().max() > 1
    with pytest.raises(ConfigError, match=r"clip = true was given, but the states of 'dit' are latents"):
        load_source(tmp_path / "dit", clip=True)
    with pytest.raises(ConfigError, match=r"leave model\.prompts out"):
        load_source(tmp_path / "dit", prompts="prompts.txt")
