"""Small real networks, made on the spot and never trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

UNETS: dict[str, dict[str, Any]] = {
    "attention": {},
    "resampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "upsample_type": "resnet",
    },
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 2**0.5},
}


@pytest.fixture
def make_unet() -> Callable[..., nn.Module]:
    """A UNet2DModel on 1x8x8 images with seeded random weights; keywords override its config."""
    from diffusers import UNet2DModel

    def make(kind: str = "attention", **overrides: Any) -> nn.Module:
        config = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        torch.manual_seed(0)
        network: nn.Module = UNet2DModel(**{**config, **UNETS[kind], **overrides})
        return network.eval().requires_grad_(False)

    return make


@pytest.fixture(params=sorted(UNETS))
def unet(request: pytest.FixtureRequest, make_unet: Callable[..., nn.Module]) -> nn.Module:
    """Each kind of small UNet in turn."""
    return make_unet(request.param)
