"""The noisy classifier that guides an ADM (arXiv 2105.05233, section 4 and appendix H), and its gradient."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.evaluation.denoiser import Condition, Gradient
from autodiffusion_optuna.evaluation.models.adm_fields import (
    CHANNELS,
    GROUPS,
    AdmFields,
    downsampling_factors,
    level_multipliers,
)


class EncoderUNetModel(nn.Module):
    """The encoder half of an ADM with attention pooling: (x, t) -> logits of the classes, by the fields of the ADM.

    Attention blocks split heads before q, k and v ("legacy" order), the pool q, k and v before heads. Keys of the state
    dict are those of the published checkpoints. ``ConfigError`` where no classifier can have these fields.
    """

    def __init__(self, adm: AdmFields) -> None:
        super().__init__()
        multipliers = level_multipliers("classifier_channel_mult", adm.classifier_channel_mult, adm.image_size)
        attending = downsampling_factors(
            "classifier_attention_resolutions", adm.classifier_attention_resolutions, adm.image_size
        )
        width, heads = adm.classifier_width, adm.classifier_num_head_channels
        if adm.classifier_pool != "attention":
            raise ConfigError(choose_from("ADM field classifier_pool", adm.classifier_pool, ["attention"]))
        if width % GROUPS or heads < 1 or any(multiplier * width % heads for multiplier in multipliers):
            raise ConfigError(
                f"ADM fields: classifier_width is {width}, but must be a multiple of {GROUPS} and of "
                f"classifier_num_head_channels {heads}"
            )
        self.width = width
        embedding = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def residual(channels: int, out: int, down: bool = False) -> nn.Module:
            return _ResidualBlock(channels, out, embedding, adm.classifier_use_scale_shift_norm, down)

        channels = multipliers[0] * width
        blocks: list[list[nn.Module]] = [[nn.Conv2d(CHANNELS, channels, 3, padding=1)]]
        for level, multiplier in enumerate(multipliers):
            for _ in range(adm.classifier_depth):
                blocks.append([residual(channels, multiplier * width)])
                channels = multiplier * width
                if 2**level in attending:
                    blocks[-1].append(_AttentionBlock(channels, heads))
            if level < len(multipliers) - 1:
                halving = nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                blocks.append([residual(channels, channels, down=True) if adm.classifier_resblock_updown else halving])
        self.input_blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.middle_block = nn.ModuleList(
            [residual(channels, channels), _AttentionBlock(channels, heads), residual(channels, channels)]
        )
        side = adm.image_size // 2 ** (len(multipliers) - 1)
        pool = _AttentionPool(side, channels, heads, adm.num_classes)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), pool)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Logits float32 [B, classes] of ``x`` float32 [B, 3, image_size, image_size] at model times float32 [B]."""
        embedding = self.time_embed(_time_features(times, self.width))
        for block in (*self.input_blocks, self.middle_block):
            for layer in cast(nn.ModuleList, block):
                x = layer(x, embedding) if isinstance(layer, _ResidualBlock) else layer(x)
        logits: Tensor = self.out(x)
        return logits


def label_gradient(classifier: EncoderUNetModel) -> Gradient:
    """grad_x log p(label | x_t) of a frozen classifier.

    Float32 and deterministic whatever surrounds the call, and possible inside inference mode: the graph is built on
    copies, as tensors made in inference mode cannot be differentiated by.
    """

    def gradient(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        exact = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(x.device.type, enabled=False),
            torch.backends.cudnn.flags(**exact),
        ):
            leaf = x.float().clone().requires_grad_()
            logits = classifier(leaf, model_times.clone())
            # Images do not mix, so the gradient of the sum holds each image's own.
            loss = functional.cross_entropy(logits, condition["label"].clone(), reduction="sum")
            (slope,) = torch.autograd.grad(loss, leaf)
            return -slope

    return gradient


def _time_features(times: Tensor, size: int) -> Tensor:
    """Cosines, then sines, of times float32 [B] at ``size`` / 2 frequencies from 1 down to 1/10000."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = times.float()[:, None] * torch.exp(-math.log(10_000) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q, k, v [B, heads, channels, positions], as [B, heads * channels, positions].

    Written out, because the backward passes of fused kernels need not give the same bits twice.
    """
    root = q.shape[2] ** -0.25
    weights = torch.softmax((q * root).transpose(2, 3) @ (k * root), dim=3)
    return (v @ weights.transpose(2, 3)).flatten(1, 2)


class _ResidualBlock(nn.Module):
    """Two convolutions with the time embedding between them; ``down`` halves the sides first."""

    def __init__(self, channels: int, out: int, embedding: int, scale_shift: bool, down: bool) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        dropout = nn.Identity()  # keeps its place in the numbering of the layers
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), dropout, nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.resample = nn.AvgPool2d(2) if down else nn.Identity()
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(self.resample(activation(norm(x))))
        modulation = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + modulation)
        for layer in rest:
            h = layer(h)
        out: Tensor = self.skip_connection(self.resample(x)) + h
        return out


class _AttentionBlock(nn.Module):
    """Self-attention over all positions, added to its input."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.heads = channels // head_channels

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2)
        q, k, v = self.qkv(self.norm(positions)).unflatten(1, (self.heads, 3, -1)).unbind(2)
        out: Tensor = positions + self.proj_out(_attend(q, k, v))
        return out.view_as(x)


class _AttentionPool(nn.Module):
    """What the mean of all positions attends to, as logits [B, classes]."""

    def __init__(self, side: int, channels: int, head_channels: int, classes: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(channels, side**2 + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, classes, 1)
        self.heads = channels // head_channels

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2)
        tokens = torch.cat([positions.mean(dim=2, keepdim=True), positions], dim=2) + self.positional_embedding
        q, k, v = self.qkv_proj(tokens).unflatten(1, (3, self.heads, -1)).unbind(1)
        logits: Tensor = self.c_proj(_attend(q[..., :1], k, v))[:, :, 0]
        return logits
