"""The noisy classifier that guides an ADM (arXiv 2105.05233, section 4 and appendix H), and its gradient."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodiffusion_optuna.evaluation.denoiser import Condition, Gradient

GROUPS = 32  # of every norm


class EncoderUNetModel(nn.Module):
    """The encoder half of an ADM with attention pooling: (x, t) -> logits of the classes.

    Arguments are guided-diffusion's of the same name: ``model_channels`` and ``channel_mult`` give the width of each
    level, ``attention_resolutions`` the downsampling factors that have attention. Attention blocks split heads before
    q, k and v ("legacy" order), the pool q, k and v before heads. Keys of the state dict are those of the published
    checkpoints.
    """

    def __init__(
        self,
        *,
        image_size: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_head_channels: int,
        use_scale_shift_norm: bool,
        resblock_updown: bool,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        embedding = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        def residual(channels: int, out: int, down: bool = False) -> nn.Module:
            return _ResidualBlock(channels, out, embedding, use_scale_shift_norm, down)

        channels = channel_mult[0] * model_channels
        blocks: list[list[nn.Module]] = [[nn.Conv2d(in_channels, channels, 3, padding=1)]]
        for level, multiplier in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                blocks.append([residual(channels, multiplier * model_channels)])
                channels = multiplier * model_channels
                if 2**level in attention_resolutions:
                    blocks[-1].append(_AttentionBlock(channels, num_head_channels))
            if level < len(channel_mult) - 1:
                halving = nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                blocks.append([residual(channels, channels, down=True) if resblock_updown else halving])
        self.input_blocks = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.middle_block = nn.ModuleList(
            [
                residual(channels, channels),
                _AttentionBlock(channels, num_head_channels),
                residual(channels, channels),
            ]
        )
        side = image_size // 2 ** (len(channel_mult) - 1)
        pool = _AttentionPool(side, channels, num_head_channels, out_channels)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), pool)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Logits float32 [B, classes] of ``x`` float32 [B, 3, image_size, image_size] at model times float32 [B]."""
        embedding = self.time_embed(_time_features(times, self.model_channels))
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
