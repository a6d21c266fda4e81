"""What loaders check alike before they make a ``Model``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.denoiser import PRECISIONS
from autodiffusion_optuna.evaluation.models.base import Options
from autodiffusion_optuna.evaluation.models.parts import first_line
from autodiffusion_optuna.evaluation.models.vae import Vae
from autodiffusion_optuna.evaluation.skip import Units, find_units

HARMLESS = {"compile", "guidance", "labels", "reduced", "trust"}
"""Options that hold for every kind of model, or that another check refuses."""


def check_options(options: Options, name: str, used: Collection[str] = ()) -> None:
    """``ConfigError`` where an option is set that a model of this kind does not use."""
    plain = Options()
    for field in fields(Options):
        given = getattr(options, field.name)
        if given != getattr(plain, field.name) and field.name not in HARMLESS and field.name not in used:
            shown = str(given) if isinstance(given, Path) else given
            raise ConfigError(
                f"{field.name} = {shown!r} is not for models such as {name!r}; leave model.{field.name} out"
            )


def check_precision(precision: str) -> None:
    """``ConfigError`` for what is no name of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ConfigError(choose_from("precision", precision, PRECISIONS))


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

    ``ModelError`` that names ``where`` if the network does not run on such states.
    """
    x, t = torch.zeros(1, *shape, device=device), torch.zeros(1, device=device)
    dtype = PRECISIONS[precision]
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return find_units(network, lambda: run(x, t))
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{where}: {device} has too little memory for even one image of this network; use another device, "
            "or a lower model.precision"
        ) from None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(f"{where}: the network does not run on {list(shape)} images ({first_line(error)})") from error


def decoded_shape(vae: Vae, shape: tuple[int, int, int], where: Path) -> tuple[int, int, int]:
    """(3, H, W) of the images that latents of ``shape`` are decoded to. ``ModelError`` where they do not fit."""
    channels, height, width = shape
    if channels != vae.channels:
        raise ModelError(
            f"{where}: states have {channels} channels, but the decoder beside it takes {vae.channels}; "
            "take both from one model"
        )
    return 3, height * vae.factor, width * vae.factor


def sides_of(size: Any, path: Path) -> tuple[int, int]:
    """(height, width) of a config's ``sample_size``, a side or both. ``ModelError`` where it is neither."""
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"{path}: sample_size is {size!r}; set it to the side of the images, or [height, width]")
    return sides[0], sides[1]
