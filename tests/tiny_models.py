"""Small real pipelines with seeded random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LATENT_CHANNELS = 4


def make_unet(**overrides: Any) -> Any:
    """A UNet2DModel of 3x16x16 images; keywords override its config."""
    from diffusers import UNet2DModel

    config: dict[str, Any] = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return UNet2DModel(**{**config, **overrides}).eval()


def make_vae(**overrides: Any) -> Any:
    """An AutoencoderKL between 3x16x16 images and 4x8x8 latents; keywords override its config."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    torch.manual_seed(1)
    return AutoencoderKL(**{**config, **overrides}).eval()


def make_dit(**overrides: Any) -> Any:
    """A DiT with 10 classes, 3 blocks and a learned variance over 4x8x8 latents; keywords override its config.

    A new DiT ends in zeros; here every weight is random, so that classes and blocks matter.
    """
    from diffusers import DiTTransformer2DModel

    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": LATENT_CHANNELS,
        "out_channels": 2 * LATENT_CHANNELS,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    torch.manual_seed(2)
    network = DiTTransformer2DModel(**{**config, **overrides}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def write_ddpm(folder: Path, **overrides: Any) -> Any:
    """A DDPMPipeline with ``make_unet``; returns its network."""
    from diffusers import DDPMPipeline, DDPMScheduler

    network = make_unet(**overrides)
    DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(folder)
    return network


def write_cosine(folder: Path) -> None:
    """Its highest level has sigma / alpha = 20291."""
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(make_unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)


def write_class_conditional(folder: Path, classes: int = 5) -> Any:
    """A DDPMPipeline whose network takes class labels; returns the network."""
    return write_ddpm(folder, num_class_embeds=classes)


def write_dit(folder: Path, **overrides: Any) -> Any:
    """A DiTPipeline with ``make_dit`` and ``make_vae``; returns it."""
    from diffusers import DDIMScheduler, DiTPipeline

    pipeline = DiTPipeline(transformer=make_dit(**overrides), vae=make_vae(), scheduler=DDIMScheduler())
    pipeline.save_pretrained(folder)
    return pipeline


def kinds_of(network: torch.nn.Module, units: Any) -> list[str]:
    """Class names of a network's skippable units, in order."""
    return [type(network.get_submodule(name)).__name__ for name in units.names]
