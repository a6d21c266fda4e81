"""What every loader returns, and what loaders have in common."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError, first_line
from autodiffusion_optuna.evaluation.cost import UnitCosts, unit_latency, unit_macs
from autodiffusion_optuna.evaluation.denoiser import PRECISIONS, Condition, Denoiser, GuidanceKind, UnitDenoise
from autodiffusion_optuna.evaluation.seeds import Draw
from autodiffusion_optuna.evaluation.units import Branches, Units, compile_units, find_units
from autodiffusion_optuna.noise import NoiseSchedule

if TYPE_CHECKING:
    from autodiffusion_optuna.evaluation.features import Extractor
    from autodiffusion_optuna.evaluation.models.vae import Vae
    from autodiffusion_optuna.evaluation.references.reference import Reference


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the images of a model are conditioned on.

    ``count``: labels or prompts there are. ``rows``: the condition [n, ...] of n of them, by index in [0, count).
    ``negative``: the condition [n, ...] that classifier-free guidance leads away from; None where there is none.
    ``draw``: how an image's index is chosen. ``fingerprint``: hex digest of all conditions and of ``draw``.
    ``prepare``: makes the rows of those indices at once, where that is cheaper; it changes no bit of them.
    """

    kind: Literal["labels", "prompts"]
    count: int
    rows: Callable[[Sequence[int]], Condition]
    negative: Callable[[int], Condition] | None
    fingerprint: str
    draw: Draw = "balanced"
    prepare: Callable[[Iterable[int]], None] | None = None


def label_conditions(
    labels: Sequence[int], device: torch.device, null: int | None = None, draw: Draw = "balanced"
) -> Conditions:
    """Condition ``{"label": int64 [n]}`` of a model with the class labels ``labels``.

    ``null``: label of no class, which classifier-free guidance leads away from; None where the model has none.
    """
    known = torch.tensor(list(labels), dtype=torch.int64, device=device)

    def rows(chosen: Sequence[int]) -> Condition:
        return {"label": known[torch.tensor(list(chosen), dtype=torch.int64, device=device)]}

    def negative(count: int) -> Condition:
        assert null is not None
        return {"label": torch.full((count,), null, device=device)}

    described = json.dumps({"labels": list(labels), "null": null, "draw": draw})
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    return Conditions("labels", len(labels), rows, negative if null is not None else None, fingerprint, draw)


@dataclass(frozen=True)
class Floor:
    """Fréchet distances of real images from a model's reference, with one extractor.

    ``values``: how many images -> the mean over disjoint groups of as many; a distance falls with their number.
    """

    extractor: str
    values: Mapping[int, float]


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen diffusion model on one device.

    ``fingerprint``: sha256 in hexadecimal over weights and configs; the same wherever the files lie, and
    without device, precision and clip. ``shape``: (C, H, W) of a state. ``denoiser``: (x, t, modes) -> x0, of a
    conditional model a ``Denoiser`` that also takes conditions.
    ``units``: names of the units that can be skipped or reused, in execution order. ``reference``: statistics of the
    data the model was trained on, for an extractor; None where the model ships with none.
    ``conditions``: None where the model is unconditional. ``guidance``: how a scale acts; ``scale``: the model's own,
    used where the study sets none. ``decode``: float32 [B, C, H, W] states -> images in [-1, 1], None where states are
    images; ``encode``: the way back, None where it is not known. ``image_shape``: (C, H, W) of an image, None for the
    state's.
    ``latent_scale``: what latents are multiplied by. ``weights``: some of them by name, see ``weights_sample``.
    ``kind``: class of the diffusers pipeline, or of the bare network; "adm", "plugin" and "mixture" for the others.
    ``notes``: what its loader assumed, chose or left out, a line each; shown wherever the study's values are.
    ``floor``: distance of real images that trained nothing from ``reference``, where the model ships with one.
    ``parameters``: numbers that its denoising network was trained to; None where that is not known.
    """

    name: str
    fingerprint: str
    shape: tuple[int, int, int]
    schedule: NoiseSchedule
    denoiser: UnitDenoise
    device: torch.device
    units: tuple[str, ...] = ()
    latent_scale: float | None = None
    weights: Mapping[str, float] | None = None
    reference: Callable[[Extractor], Reference] | None = None
    conditions: Conditions | None = None
    guidance: GuidanceKind = "none"
    scale: float = 1.0
    decode: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    image_shape: tuple[int, int, int] | None = None
    kind: str = "UNet2DModel"
    notes: tuple[str, ...] = ()
    floor: Floor | None = None
    parameters: int | None = None

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.image_shape or self.shape

    def bind(self, chosen: Sequence[int], scale: float | None = None) -> UnitDenoise:
        """``denoiser`` for a batch whose images have the labels or prompts ``chosen``, by index, at a guidance scale.

        An unconditional model has nothing to choose and ignores ``chosen``. ``ConfigError`` where it is given a scale.
        """
        if self.conditions is None:
            self.check_scale(scale)
            return self.denoiser
        assert isinstance(self.denoiser, Denoiser)
        negative = self.conditions.negative(len(chosen)) if self.conditions.negative else None
        strength = self.scale if scale is None else scale
        return partial(self.denoiser, condition=self.conditions.rows(chosen), negative=negative, scale=strength)

    def check_scale(self, scale: float | None) -> None:
        """``ConfigError`` where a guidance scale is given to a model that has no guidance."""
        if scale is not None and self.guidance == "none":
            raise ConfigError(
                f"guidance {scale:g} was given, but model {self.name!r} has none (it is unconditional, was distilled "
                "to need none, or has neither a classifier nor an empty condition); leave sampling.guidance out "
                "(delete the line)"
            )

    def costs(self, kind: Literal["macs", "latency"] = "macs", batch: int = 1) -> UnitCosts:
        """Cost of one evaluation and what each unit saves of it.

        ``batch``: images an evaluation, for ``"latency"`` only; fewer are timed where they do not fit.
        Classifier-free guidance counts both of its halves; a classifier, which has no units, is not counted.
        ``ModelError`` where not even one image fits.
        """
        batch = 1 if kind == "macs" else batch
        x = torch.zeros(batch, *self.shape, device=self.device)
        denoise = self.bind([0] * batch, 0.0 if self.guidance == "classifier" else None)

        t, units = self.schedule.T // 2, len(self.units)
        latest = Branches(keep=frozenset(range(units)))

        def evaluate(modes: int) -> Tensor:
            return denoise(x, t, modes, Branches(latest.kept)) if modes else denoise(x, t, 0)

        try:
            if kind == "latency" and units:
                denoise(x, t, 0, latest)
            return unit_macs(evaluate, units) if kind == "macs" else unit_latency(evaluate, units, self.device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise ModelError(
                    f"{self.name}: the device ran out of memory with a single image; use a lower model.precision or "
                    "another device"
                ) from None
        return self.costs(kind, batch // 2)

    def to_images(self, x: Tensor) -> Tensor:
        """uint8 [B, C, H, W] of states ``x`` float [B, C, H, W]: [-1, 1] becomes [0, 255], clamped and rounded."""
        with torch.inference_mode():
            images = x if self.decode is None else self.decode(x.float())
            return ((images + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def find_device(device: str) -> torch.device:
    """The device of that name, or the best one for ``"auto"``. ``ModelError`` where it does not exist."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if gpus else "cpu")
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if device not in known:
        raise ModelError(f"device {device!r} does not exist here; use one of: auto, {', '.join(known)}")
    return torch.device(device)


SETTINGS = ("preset", "fields", "classifier", "prompts", "negative_prompt", "size", "config")
"""Settings of ``[model]`` that some kinds of models alone can use."""


def check_unused(config: ModelConfig, name: str, used: Collection[str] = ()) -> None:
    """``ConfigError`` that names all settings that are given and that a model of this kind does not use."""
    unused = [setting for setting in SETTINGS if getattr(config, setting) and setting not in used]
    if unused:
        given = " and ".join(f"{setting} = {getattr(config, setting)!r}" for setting in unused)
        lines = " and ".join(f"model.{setting}" for setting in unused)
        verb = "is" if len(unused) == 1 else "are"
        raise ConfigError(f"{given} {verb} not for models such as {name!r}; leave {lines} out (delete the line)")


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
    """Units of ``network`` in the order in which ``run(x [1, C, H, W], model times [1])`` reaches them.

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


def check_channels(channels: Any, out: Any, path: Path | str) -> int:
    """Channels of a network's states; ``ModelError`` where a config gives it others out than in."""
    if not isinstance(channels, int) or out not in (channels, 2 * channels):
        raise ModelError(
            f"{path}: {channels} channels in and {out} out; expected as many out as in, "
            "or twice as many (learned variance)"
        )
    return channels


def sides_of(size: Any, path: Path | str) -> tuple[int, int]:
    """(height, width) of a config's ``sample_size``, a side or both. ``ModelError`` where it is neither."""
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"{path}: sample_size is {size!r}; set it to the side of the images, or [height, width]")
    return sides[0], sides[1]


def count_parameters(network: nn.Module) -> int:
    """Numbers that a network was trained to."""
    return sum(parameter.numel() for parameter in network.parameters())


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
