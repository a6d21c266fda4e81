"""What loaders have in common: checks of settings and configs, tracing the units, and the ``Model`` at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError, first_line
from autodiffusion_optuna.evaluation.denoiser import PRECISIONS, Denoiser
from autodiffusion_optuna.evaluation.models.base import Model
from autodiffusion_optuna.evaluation.models.vae import Vae
from autodiffusion_optuna.evaluation.skip import Units, compile_units, find_units

SETTINGS = ("preset", "fields", "classifier", "prompts", "negative_prompt", "size", "config")
"""Settings of ``[model]`` that some kinds of models alone can use."""


def check_unused(config: ModelConfig, name: str, used: Collection[str] = ()) -> None:
    """``ConfigError`` where a setting is given that a model of this kind does not use."""
    for setting in SETTINGS:
        given = getattr(config, setting)
        if given and setting not in used:
            raise ConfigError(f"{setting} = {given!r} is not for models such as {name!r}; leave model.{setting} out")


def choose_clip(clip: bool | None, name: str, latent: bool) -> bool:
    """Whether to clamp x0 to [-1, 1]; None means where states are images. ``ConfigError`` for latents."""
    if clip and latent:
        raise ConfigError(
            f"clip = true was given, but the states of {name!r} are latents, which go beyond [-1, 1]; "
            "leave model.clip out"
        )
    return not latent if clip is None else clip


def trace_units(
    network: nn.Module,
    run: Callable[[Tensor, Tensor], object],
    shape: tuple[int, int, int],
    device: torch.device,
    precision: str,
    where: Path | str,
) -> Units:
    """Skippable units of ``network`` in the order in which ``run(x [1, C, H, W], model times [1])`` reaches them.

    On the meta device that costs nothing. ``ModelError`` that names ``where`` if the network does not run on such
    states.
    """
    x, t = torch.zeros(1, *shape, device=device), torch.zeros(1, device=device)
    dtype = PRECISIONS[precision]
    full = dtype == torch.float32 or device.type == "meta"
    try:
        with contextlib.nullcontext() if full else torch.autocast(device.type, dtype):
            return find_units(network, lambda: run(x, t))
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{where}: {device} has too little memory for even one image of this network; use another device, "
            "or a lower model.precision"
        ) from None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{where}: the network does not run on states of {list(shape)} ({first_line(error)}); take all parts from "
            "one pipeline"
        ) from error


def check_channels(channels: Any, out: Any, path: Path) -> int:
    """Channels of a network's states; ``ModelError`` where a config gives it others out than in."""
    if not isinstance(channels, int) or out not in (channels, 2 * channels):
        raise ModelError(
            f"{path}: {channels} channels in and {out} out; expected as many out as in, "
            "or twice as many (learned variance)"
        )
    return channels


def sides_of(size: Any, path: Path) -> tuple[int, int]:
    """(height, width) of a config's ``sample_size``, a side or both. ``ModelError`` where it is neither."""
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"{path}: sample_size is {size!r}; set it to the side of the images, or [height, width]")
    return sides[0], sides[1]


def decoded_shape(vae: Vae, shape: tuple[int, int, int], where: Path) -> tuple[int, int, int]:
    """(3, H, W) of the images that latents of ``shape`` are decoded to. ``ModelError`` where they do not fit."""
    channels, height, width = shape
    if channels != vae.channels:
        raise ModelError(
            f"{where}: states have {channels} channels, but the decoder beside it takes {vae.channels}; "
            "take both from one model"
        )
    return 3, height * vae.factor, width * vae.factor


def assemble(config: ModelConfig, denoiser: Denoiser, vae: Vae | None = None, **facts: Any) -> Model:
    """The model around a denoiser, its units compiled where the study wants that.

    ``vae``: decodes its states. ``facts``: the fields of ``Model`` that neither of them tells.
    """
    if config.compile and denoiser.units:
        compile_units(denoiser.units)
    if vae is not None:
        facts |= {"latent_scale": vae.scale, "decode": vae.decode, "encode": vae.encode}
    return Model(
        schedule=denoiser.schedule,
        denoiser=denoiser,
        device=denoiser.device,
        units=denoiser.units.names if denoiser.units else (),
        guidance=denoiser.guidance,
        **facts,
    )
