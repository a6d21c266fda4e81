"""Text-to-image pipelines as diffusers saves them: real classes, small sizes, seeded random weights, made offline."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PROMPTS = ("a cat", "two dogs, far away", "a red house 2", "the sea", "a cat")
LENGTH = 16  # tokens that the CLIP models take
SIZE = [16, 24]  # height and width of images in tests; they differ, so that neither passes for the other
CHOSEN = [0, 1, 3]  # prompts that are drawn
SIDE = 16  # pixels of the UNets' and SD3's images by default: latents of 8 x 8


def write_prompts(folder: Path) -> Path:
    """``prompts.txt`` in ``folder``: five prompts, the last one equal to the first."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def write_sd(folder: Path, prediction_type: str = "epsilon", **save: Any) -> Path:
    """Stable Diffusion 1.x (``epsilon``) or 2.x (``v_prediction``); ``save``: for ``save_pretrained``."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        unet=sd_unet(),
        vae=_vae(4, 0.18215),
        text_encoder=_clip(32),
        tokenizer=_clip_tokenizer(),
        scheduler=PNDMScheduler(
            **BETAS, skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, **save)
    return folder


def write_zero_snr(folder: Path) -> Path:
    """Stable Diffusion 2.x, tuned on noise whose last level has no signal."""
    from diffusers import DDIMScheduler

    write_sd(folder, "v_prediction")
    config = {**BETAS, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    DDIMScheduler(**config, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


def write_sdxl(folder: Path, force_zeros: bool = True, **save: Any) -> Path:
    """Stable Diffusion XL; ``force_zeros``: its empty negative prompt is zero."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline(
        unet=sdxl_unet(),
        vae=_vae(4, 0.13025),
        text_encoder=_clip(32),
        text_encoder_2=_clip(16, projection=24),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, **save)
    return folder


def write_sd3(folder: Path, t5: bool = False, dynamic: bool = False, **save: Any) -> Path:
    """Stable Diffusion 3; ``t5``: with its third text encoder; ``dynamic``: shift by the size of the image."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        vae=_vae(4, 1.5305, 0.0609),
        text_encoder=_clip(16, projection=24),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(32, projection=16),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(64) if t5 else None,
        tokenizer_3=_t5_tokenizer(256) if t5 else None,
    )
    pipeline.save_pretrained(folder, **save)
    return folder


def write_flux(folder: Path, guidance: bool = True, **save: Any) -> Path:
    """Flux: dev with a guidance embedding and a shift by the size of the image, or schnell without either."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipeline = FluxPipeline(
        transformer=flux_transformer(guidance),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        vae=_vae(4, 0.3611, 0.1159),
        text_encoder=_clip(24),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(32),
        tokenizer_2=_t5_tokenizer(512),
    )
    pipeline.save_pretrained(folder, **save)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd": write_sd,
    "sd2": lambda folder: write_sd(folder, "v_prediction"),
    "sd2-zero": write_zero_snr,
    "sdxl": write_sdxl,
    "sdxl-empty": lambda folder: write_sdxl(folder, force_zeros=False),
    "sd3": write_sd3,
    "sd3-t5": lambda folder: write_sd3(folder, t5=True),
    "sd3-dynamic": lambda folder: write_sd3(folder, dynamic=True),
    "flux": write_flux,
    "schnell": lambda folder: write_flux(folder, guidance=False),
}
"""Name -> how a pipeline is written to a folder."""


def noise(model: Any, count: int = len(CHOSEN)) -> torch.Tensor:
    """Standard normal states of a model."""
    return torch.randn(count, *model.shape, generator=torch.Generator().manual_seed(0))


def weights_in(file: Path) -> dict[str, torch.Tensor]:
    """Copies, as what safetensors reads is the file itself, mapped into memory."""
    return {key: value.clone() for key, value in load_file(file).items()}


def original_layout(folder: Path, file: Path) -> None:
    """Write the UNet of a tiny Stable Diffusion folder under the names that its authors gave its weights."""
    renamed = {}
    for key, value in weights_in(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        for new, old in ORIGINAL.items():
            if key.startswith(new):
                renamed["model.diffusion_model." + key.replace(new, old, 1)] = value
                break
        else:
            raise AssertionError(key)
    resnet = {
        ".norm1.": ".in_layers.0.", ".conv1.": ".in_layers.2.", ".time_emb_proj.": ".emb_layers.1.",
        ".norm2.": ".out_layers.0.", ".conv2.": ".out_layers.3.", ".conv_shortcut.": ".skip_connection.",
    }  # fmt: skip
    weights = {}
    for key, value in renamed.items():
        name = key
        if "transformer_blocks" not in key:
            for new, old in resnet.items():
                name = name.replace(new, old)
        weights[name] = value
    save_file(weights, file)


ORIGINAL = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.",
    "down_blocks.0.attentions.0.": "input_blocks.1.1.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.",
    "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.1.conv.",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.attentions.0.": "output_blocks.2.1.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "up_blocks.1.attentions.1.": "output_blocks.3.1.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}


def sd_unet() -> Any:
    """12 units: 8 resnets and 4 Transformer2DModels of one block. Latents [4, 8, 8]."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def sdxl_unet() -> Any:
    """Units are resnets and transformer blocks, of which each Transformer2DModel has two. Latents [4, 8, 8]."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        cross_attention_dim=32 + 16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def sd3_transformer() -> Any:
    """Three blocks: with a second attention (SD3.5), plain, and the last, which ends the text. Latents [4, 8, 8]."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=24 + 16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def flux_transformer(guidance: bool = True) -> Any:
    """Two blocks of both kinds. Latents [4, h, w], packed [h w / 4, 16]."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()


BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _vae(channels: int, scaling: float, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocab, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = [*string.ascii_lowercase, *string.digits, ",", "."]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def _clip(width: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    vocab, _ = _clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projection or width,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5_tokenizer(length: int) -> Any:
    from transformers import T5TokenizerFast

    pieces = ["▁", "▁a", "▁cat", "▁dog", *string.ascii_lowercase, *string.digits, ",", "."]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(len(piece))) for piece in pieces)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=length)


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()
