"""CLIP ViT-B/32, as clean-fid has it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.features.base import Extractor, Wanted

SIZE = 224


def load_clip(wanted: Wanted) -> Extractor:
    """512 features of OpenAI's package."""
    weights = wanted.require()
    command = "pip install git+https://github.com/openai/CLIP.git (PyPI's clip is another program)"
    if not hasattr(wanted.import_package("clip", command), "load"):
        raise ConfigError(f"extractor 'clip' needs OpenAI's clip, another package of that name is here; {command}")
    package = wanted.import_package("cleanfid.clip_features", "pip install clean-fid torchvision")
    with wanted.reading(weights, "does not hold CLIP", "give a complete ViT-B-32.pt"):
        # clip.load takes the path of a file in place of a name, and then downloads nothing.
        net = package.CLIP_fx(str(weights), device=str(wanted.device))
        net.model.float()  # half precision on a GPU, single on a CPU: their features must agree
    dim = int(net.model.visual.output_dim)
    return wanted.extractor(
        lambda images: net(resize_clip(images).expand(-1, 3, -1, -1)), dim, weights, "bicubic-crop", SIZE
    )


def resize_clip(images: Tensor) -> Tensor:
    """CLIP's: the shorter side to 224, bicubic with antialiasing, rounded, and the middle cut out.

    uint8 [B, C, H, W] to float32 [B, C, 224, 224] of whole numbers in 0..255; within 2 of PIL's.
    Source: clean-fid 0.1.35, ``cleanfid.clip_features.img_preprocess_clip``.
    """
    height, width = images.shape[2:]
    tall, wide = (SIZE * side // min(height, width) for side in (height, width))
    resized = images.float()
    for size in ((height, wide), (tall, wide)):  # PIL's two passes: along rows, rounded and clipped, then columns
        resized = F.interpolate(resized, size, mode="bicubic", antialias=True, align_corners=False)
        resized = resized.round_().clamp_(0, 255)
    top, left = (round((side - SIZE) / 2) for side in (tall, wide))
    return resized[..., top : top + SIZE, left : left + SIZE]
