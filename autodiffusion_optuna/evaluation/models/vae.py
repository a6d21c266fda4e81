"""The autoencoder of a latent model: latents to images, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.denoiser import PRECISIONS
from autodiffusion_optuna.evaluation.models.parts import digest, is_settled, load_part, read_config

AUTOENCODERS = ("AutoencoderKL", "VQModel")

SLICE_PIXELS = 2**21
"""Pixels decoded at once, 8 images of 512x512. A decoder needs about 2 KiB of memory a pixel, a latent 0.25 byte."""


@dataclass(frozen=True, eq=False)
class Vae:
    """A frozen decoder on one device.

    ``channels``: of a latent. ``factor``: side of an image / side of its latent. ``digest``: sha256 in hexadecimal of
    weights and config. ``decode``: float32 [B, c, h, w] latents as the diffusion model knows them, that is scaled
    -> float32 [B, 3, H, W] in about [-1, 1]. ``encode``: the way back, to the most likely latents.
    ``notes``: what its files do not say and was assumed, a line each.
    """

    channels: int
    factor: int
    digest: str
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    notes: tuple[str, ...] = ()
    scale: float = 1.0
    """What latents were multiplied by for the diffusion model, in the mean of their channels."""

    def image_shape(self, shape: tuple[int, int, int], where: Path | str) -> tuple[int, int, int]:
        """(3, H, W) of the images of latents of ``shape``. ``ModelError``, naming ``where``, where they do not fit."""
        channels, height, width = shape
        if channels != self.channels:
            raise ModelError(
                f"{where}: states have {channels} channels, but the decoder beside it takes {self.channels}; "
                "take both from one model"
            )
        return 3, height * self.factor, width * self.factor


def load_vae(
    folder: Path,
    device: torch.device,
    precision: str = "float32",
    scaling: float | None = None,
    usual: bool = False,
) -> Vae:
    """The decoder of the AutoencoderKL or VQModel in ``folder``, which holds its ``config.json`` and weights.

    Latents are divided by ``scaling_factor`` and moved by ``shift_factor``, or scaled and moved by channel where the
    config has ``latents_mean`` and ``latents_std`` (arXiv 2112.10752, section D.1). ``scaling``: where the config
    has no factor. ``precision``: of the decoder, under autocast; float16 is raised to float32 where the config has
    ``force_upcast``, because such decoders overflow. Nothing is downloaded.
    Where the config has no factor it is 1 for a VQModel, as CompVis trained with those, and else the class's default.
    ``usual``: whether the pipeline always scaled by that one while configs did not name it, which then needs no note.
    ``ModelError`` where a file is missing or broken, or the class is another.
    """
    stored = read_config(folder, AUTOENCODERS)
    network: Any
    network, files, notes = load_part(folder, stored["_class_name"], stored)
    config: Any = network.config
    if "scaling_factor" in stored:
        scaling = None
    elif scaling is None:
        scaling = 1.0 if stored["_class_name"] == "VQModel" else None
        chosen = "1, as VQ models were trained" if scaling else f"{config.scaling_factor:g}, the default of its class"
        if not (usual and is_settled("scaling_factor", stored)):
            notes.append(f"{folder / 'config.json'} gives no scaling_factor of latents; assumed is {chosen}")
    encoder = nn.Sequential(network.encoder, network.quant_conv or nn.Identity()).cpu()
    network.encoder = network.quant_conv = nn.Identity()  # a third of the weights, and hardly ever run
    network.to(device)

    def encode(image: Tensor) -> Tensor:
        encoder.to(device)
        try:
            latent: Tensor = encoder(image)
        finally:
            encoder.cpu()  # it runs once, and its memory is worth more to the network
        return latent

    upcast = precision == "float16" and config.force_upcast
    dtype = torch.float32 if upcast else PRECISIONS[precision]
    override = {} if scaling is None else {"scaling_factor": scaling}
    whole = digest(files, {**stored, **override})
    made = make_vae(network, encode, whole, folder / "config.json", scaling=scaling, autocast=dtype)
    return replace(made, notes=tuple(notes))


def make_vae(
    network: Any,
    encode: Callable[[Tensor], Tensor],
    digest: str,
    where: Path | str,
    *,
    scaling: float | None = None,
    autocast: torch.dtype = torch.float32,
) -> Vae:
    """The decoder ``network`` on its device, in its own dtype or under ``autocast``.

    ``encode``: its encoder, images float32 [B, 3, H, W] -> latents [B, c or 2c, h, w], not scaled. ``where`` stands for
    its config in a ModelError. ``scaling``: in place of its config's.
    """
    config, device = network.config, network.device
    channels = config.get("vq_embed_dim") or config.latent_channels
    gain, offset = _affine(config, scaling, channels, where, device)

    def decode(latents: Tensor) -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
            images: Tensor = network.decode((latents * gain + offset).to(network.dtype), return_dict=False)[0]
        return images.float()

    @torch.inference_mode()
    def encode_scaled(images: Tensor) -> Tensor:
        latents = torch.cat([encode(image) for image in torch.split(images.to(device, torch.float32), 1)]).float()
        return (latents[:, :channels] - offset) / gain  # of an AutoencoderKL the mean comes first

    factor = 2 ** (len(config.block_out_channels) - 1)
    scale = float(1 / gain.mean())
    return Vae(channels, factor, digest, SlicedDecode(decode, factor), encode=encode_scaled, scale=scale)


def _affine(
    config: Any, scaling: float | None, channels: int, where: Path | str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(gain, offset), float32 [1, c or 1, 1, 1]: a diffusion model's latents times gain plus offset are decoded."""
    factor = config.scaling_factor if scaling is None else scaling
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise ModelError(f"{where}: latents_mean is {mean!r} and latents_std {std!r}; give both, or null for both")
    shift = config.get("shift_factor") or 0.0
    try:
        gain = torch.tensor(std or [1.0], dtype=torch.float32).reshape(1, -1, 1, 1) / float(factor)
        offset = torch.tensor(mean or [float(shift)], dtype=torch.float32).reshape(1, -1, 1, 1)
        fits = all(t.shape[1] in (1, channels) and t.isfinite().all() for t in (gain, offset))
    except (TypeError, ValueError, ZeroDivisionError):
        fits = False
    if not fits:
        raise ModelError(
            f"{where}: scaling_factor {factor!r}, shift_factor {shift!r}, latents_mean {mean!r} and "
            f"latents_std {std!r} do not scale latents of {channels} channels; copy the config again"
        )
    return gain.to(device), offset.to(device)


@dataclass(eq=False)
class SlicedDecode:
    """Decodes a few images at a time, and fewer from then on if even they do not fit the device's memory."""

    decode: Callable[[Tensor], Tensor]
    factor: int
    pixels: int = SLICE_PIXELS

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W]. ``torch.OutOfMemoryError`` where not even one image fits."""
        area = latents.shape[2] * latents.shape[3] * self.factor**2
        images: list[Tensor] = []
        done = 0
        while done < len(latents):
            count = max(1, self.pixels // area)
            try:
                images.append(self.decode(latents[done : done + count].float()))
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                self.pixels = count // 2 * area
                continue
            done += count
        return torch.cat(images)
