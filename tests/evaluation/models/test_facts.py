"""No default stands in for a fact that a model's files do not give: it is refused, or one line says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_source import load_source
from tiny_adm import write_adm
from tiny_models import make_unet, make_vae, write_class_conditional, write_ddpm, write_dit
from tiny_pipelines import WRITERS, write_prompts

from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.evaluation.models import MODELS, Model
from autodiffusion_optuna.noise import from_scheduler_config

SCHEDULER = "scheduler/scheduler_config.json"


def write_flow(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    write_ddpm(folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")


def write_ldm(folder: Path, kind: str = "kl") -> Any:
    """Latents of 4 channels with an AutoencoderKL, or of 3 with a VQModel; returns the decoder."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    decoder: Any = make_vae(scaling_factor=0.5)
    if kind == "vq":
        decoder = VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            num_vq_embeddings=16,
        ).eval()
    channels = decoder.config.latent_channels
    unet = make_unet(sample_size=8, in_channels=channels, out_channels=channels)
    LDMPipeline(vqvae=decoder, unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)
    return decoder


KINDS: dict[str, Callable[[Path], object]] = {
    "ddpm": write_ddpm,
    "classes": write_class_conditional,
    "flow": write_flow,
    "ldm": write_ldm,
    "dit": write_dit,
    **WRITERS,
}


def load(folder: Path, **settings: Any) -> Model:
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    text = kind.startswith(("Stable", "Flux"))
    return load_source(folder, **({"prompts": write_prompts(folder.parent)} if text else {}), **settings)


def edit(path: Path, *lost: str, **changes: Any) -> None:
    stored = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in stored.items() if key not in lost}))


def outcome(folder: Path) -> tuple[str, ...]:
    """The notes of the model, or the line with which it is refused."""
    try:
        return load(folder).notes
    except AdoptError as error:
        return (f"refused: {error}",)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_where_the_files_say_all(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "model")
    notes = outcome(tmp_path / "model")
    if kind == "classes":
        assert len(notes) == 1
        assert "does not say whether one of its 5 classes means no class" in notes[0]
        assert load(tmp_path / "model", fields={"null_class": 4}).notes == ()
        return
    if kind in ("flux", "schnell"):  # which has no size of its own in any of its files
        assert notes == (
            "the network's config gives no sample_size; images have the pipeline's usual one unless model.size is set",
        )
        assert load(tmp_path / "model", size=[16, 16]).notes == ()
        return
    assert notes == ()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_said_of_bundled_models(name: str) -> None:
    assert load_source(name).notes == ()


FACTS = [
    # what of the noise
    ("ddpm", SCHEDULER, "num_train_timesteps", "num_train_timesteps = 1000"),
    ("ddpm", SCHEDULER, "beta_start", "beta_start = 0.0001"),
    ("ddpm", SCHEDULER, "beta_end", "beta_end = 0.02"),
    ("ddpm", SCHEDULER, "beta_schedule", 'beta_schedule = "linear"'),
    ("ddpm", SCHEDULER, "prediction_type", 'prediction_type = "epsilon"'),
    ("dit", SCHEDULER, "prediction_type", 'prediction_type = "epsilon"'),
    ("sd", SCHEDULER, "prediction_type", 'prediction_type = "epsilon"'),
    ("sd2-zero", SCHEDULER, "rescale_betas_zero_snr", "rescale_betas_zero_snr = false"),
    ("sdxl", SCHEDULER, "beta_start", "beta_start = 0.0001"),
    ("flow", SCHEDULER, "shift", "shift = 1.0"),
    ("flow", SCHEDULER, "num_train_timesteps", "num_train_timesteps = 1000"),
    ("sd3", SCHEDULER, "shift", "shift = 1.0"),
    ("sd3-dynamic", SCHEDULER, "max_shift", "max_shift = 1.15"),
    ("flux", SCHEDULER, "base_shift", "base_shift = 0.5"),
    # of the latents
    ("ldm", "vqvae/config.json", "scaling_factor", "assumed is 0.18215, the default of its class"),
    ("dit", "vae/config.json", "scaling_factor", "assumed is 0.18215, the default of its class"),
    ("sd", "vae/config.json", "scaling_factor", "assumed is 0.18215, the default of its class"),
    ("sd3", "vae/config.json", "shift_factor", "gives no shift_factor of latents; assumed is 0"),
    ("flux", "vae/config.json", "shift_factor", "gives no shift_factor of latents; assumed is 0"),
    ("sd", "vae/config.json", "norm_num_groups", "refused: "),
    ("sd", "vae/config.json", "act_fn", 'act_fn = "silu"'),
    # of the network
    ("ddpm", "unet/config.json", "sample_size", "refused: "),
    ("dit", "transformer/config.json", "sample_size", "refused: "),
    ("sd", "unet/config.json", "sample_size", "refused: "),
    ("sd3", "transformer/config.json", "sample_size", "refused: model.size is 256 x 256"),
    ("ddpm", "unet/config.json", "in_channels", "refused: "),
    ("ddpm", "unet/config.json", "attention_head_dim", "attention_head_dim = 8"),
    ("ddpm", "unet/config.json", "flip_sin_to_cos", "flip_sin_to_cos = true"),
    ("ddpm", "unet/config.json", "freq_shift", "freq_shift = 0"),
    ("ddpm", "unet/config.json", "norm_eps", "norm_eps = 1e-05"),
    ("classes", "unet/config.json", "num_class_embeds", "refused: "),
    ("sd", "unet/config.json", "norm_num_groups", "refused: "),
    ("sd", "unet/config.json", "attention_head_dim", "attention_head_dim = 8"),
    ("dit", "transformer/config.json", "norm_eps", "norm_eps = 1e-05"),
    ("dit", "transformer/config.json", "num_embeds_ada_norm", "refused: "),
    ("flux", "transformer/config.json", "guidance_embeds", "refused: "),
    # of the pipeline
    ("sdxl", "model_index.json", "force_zeros_for_empty_prompt", "assumed is true"),
]
"""(model, file, fact that is left out of it, what is then said)."""


@pytest.mark.parametrize(("kind", "file", "fact", "words"), FACTS)
def test_a_missing_fact_is_refused_or_said(tmp_path: Path, kind: str, file: str, fact: str, words: str) -> None:
    folder = tmp_path / "model"
    KINDS[kind](folder)
    edit(folder / file, fact)
    said = outcome(folder)
    assert any(words in line and "\n" not in line for line in said), said


@pytest.mark.parametrize(("kind", "file", "fact", "words"), [row for row in FACTS if row[1] == SCHEDULER])
def test_null_is_a_missing_fact(tmp_path: Path, kind: str, file: str, fact: str, words: str) -> None:
    folder = tmp_path / "model"
    KINDS[kind](folder)
    edit(folder / file, **{fact: None})
    null = load(folder)
    assert any(words in line for line in null.notes), null.notes
    edit(folder / file, fact)
    np.testing.assert_array_equal(null.schedule.lambdas, load(folder).schedule.lambdas)


OLD = (
    (SCHEDULER, "prediction_type", "0.6.0"),
    ("vae/config.json", "scaling_factor", "0.6.0"),
    ("unet/config.json", "time_embedding_type", "0.10.0.dev0"),
)
"""(file, fact that Stable Diffusion's on the hub leaves out, a version of diffusers that did not know it)."""


def test_facts_that_had_one_value_when_a_file_was_written_are_not_said(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    KINDS["sd"](folder)
    expected = load(folder)
    for file, fact, version in OLD:
        edit(folder / file, fact, _diffusers_version=version)
    model = load(folder)
    assert model.notes == ()
    assert (model.latent_scale, model.denoiser.prediction) == (expected.latent_scale, "epsilon")  # type: ignore[attr-defined]
    edit(folder / SCHEDULER, predict_epsilon=False)
    assert 'prediction_type = "epsilon"' in load(folder).notes[0]
    for file, _, _ in OLD:
        edit(folder / file, _diffusers_version="0.30.0")
    assert len(load(folder).notes) == 3
    write_ldm(tmp_path / "ldm")  # whose pipeline then did not scale
    edit(tmp_path / "ldm" / "vqvae" / "config.json", "scaling_factor", _diffusers_version="0.6.0")
    assert len(load(tmp_path / "ldm").notes) == 1


def test_a_scheduler_without_a_class_is_said_or_refused(tmp_path: Path) -> None:
    write_ddpm(tmp_path / "model")
    path = tmp_path / "model" / SCHEDULER
    edit(path, _class_name=None)
    assert any('_class_name = "DDPMScheduler"' in line for line in outcome(tmp_path / "model"))
    edit(path, _class_name=["DDPMScheduler"])
    assert '_class_name is ["DDPMScheduler"]; give the name' in outcome(tmp_path / "model")[0]


@pytest.mark.parametrize("fact", ["beta_start", "beta_end", "num_train_timesteps"])
def test_a_fact_that_is_no_number_is_named(tmp_path: Path, fact: str) -> None:
    write_ddpm(tmp_path / "model")
    edit(tmp_path / "model" / SCHEDULER, **{fact: [1]})
    assert f"scheduler: {fact} is [1]; give a number" in outcome(tmp_path / "model")[0]


def test_latents_of_vq_models_are_not_scaled(tmp_path: Path) -> None:
    """Their class's default, 0.18215, is Stable Diffusion's; CompVis trained them unscaled."""
    decoder = write_ldm(tmp_path / "model", "vq")
    given = load(tmp_path / "model")
    path = tmp_path / "model" / "vqvae" / "config.json"
    edit(path, "scaling_factor")
    model = load(tmp_path / "model")
    z = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        images = decoder.decode(z).sample
    assert model.decode is not None
    torch.testing.assert_close(model.decode(z), images, rtol=1e-4, atol=1e-4)
    assert model.notes == (f"{path} gives no scaling_factor of latents; assumed is 1, as VQ models were trained",)
    assert given.notes == ()
    assert given.fingerprint != model.fingerprint


@pytest.mark.parametrize("kind", ["HeunDiscreteScheduler", "LCMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_defaults_are_those_of_the_class(tmp_path: Path, kind: str) -> None:
    import diffusers

    write_ddpm(tmp_path / "model")
    scheduler = getattr(diffusers, kind)()
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    edit(tmp_path / "model" / SCHEDULER, "beta_start", "beta_end", "num_train_timesteps")
    model = load(tmp_path / "model")
    np.testing.assert_allclose(model.schedule.alphas**2, scheduler.alphas_cumprod.numpy(), rtol=1e-4)
    assert f"beta_start = {scheduler.config.beta_start}" in model.notes[0]


def test_flows_take_times_in_the_schedulers_range(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    write_ddpm(tmp_path / "model")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=400, shift=2.0)
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    schedule = load(tmp_path / "model").schedule
    np.testing.assert_allclose(schedule.model_times, 400 * schedule.sigmas)
    config = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).config
    np.testing.assert_array_equal(
        from_scheduler_config(config).sigmas,
        from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}).sigmas,
    )
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "model" / "scheduler")
    assert "use_dynamic_shifting=false" in outcome(tmp_path / "model")[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_sample": False}, "clip_sample = false"),
        ({"clip_sample_range": 2.0}, "clip_sample_range = 2.0"),
        ({"thresholding": True}, "thresholding = true"),
    ],
)
def test_a_clip_that_the_scheduler_does_not_have_is_said(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_ddpm(tmp_path / "model")
    edit(tmp_path / "model" / SCHEDULER, **changes)
    (note,) = load(tmp_path / "model").notes
    assert f"x0 is clamped to [-1, 1], but the scheduler has {words}; set model.clip" in note
    assert load_source(tmp_path / "model", clip=True).notes == ()


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("use_new_attention_order", "use_new_attention_order = false"),
        ("noise_schedule", 'noise_schedule = "linear"'),
        ("diffusion_steps", "diffusion_steps = 1000"),
        ("rescale_timesteps", "rescale_timesteps = false"),
        ("predict_xstart", "predict_xstart = false"),
    ],
)
def test_fields_of_adm_that_no_weight_shows_are_said(tmp_path: Path, lost: str, words: str) -> None:
    path, _, fields = write_adm(tmp_path)
    whole = {
        "use_new_attention_order": False,
        "num_heads": 1,
        "num_head_channels": -1,
        "num_heads_upsample": -1,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "rescale_timesteps": False,
        "predict_xstart": False,
        **fields,
    }
    assert load_source(f"adm:{path}", fields=whole).notes == ()
    part = {key: value for key, value in whole.items() if key != lost}
    (note,) = load_source(f"adm:{path}", fields=part).notes
    assert note.startswith("model.fields does not say all that no weight shows; assumed is guided-diffusion's default")
    assert words in note
