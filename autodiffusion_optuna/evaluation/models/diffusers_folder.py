"""Models from a local folder that diffusers saved: a UNet2DModel over pixels or latents, with classes or without."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.denoiser import UNCONDITIONAL, Condition, Denoiser, GuidanceKind, weights_sample
from autodiffusion_optuna.evaluation.models.base import Conditions, Model, Options, find_device
from autodiffusion_optuna.evaluation.models.checks import (
    check_options,
    check_precision,
    choose_clip,
    decoded_shape,
    sides_of,
    trace_units,
)
from autodiffusion_optuna.evaluation.models.labels import label_conditions
from autodiffusion_optuna.evaluation.models.parts import (
    digest,
    load_part,
    load_scheduler,
    networks_beside,
    read_config,
    read_json,
)
from autodiffusion_optuna.evaluation.models.vae import load_vae
from autodiffusion_optuna.evaluation.skip import compile_units

NETWORK = "UNet2DModel"
DECODERS = ("vae", "vqvae")
"""Names that pipelines give the part that decodes latents."""


def load_folder(
    folder: Path,
    device: str = "cpu",
    precision: str = "float32",
    clip: bool | None = None,
    name: str = "",
    options: Options | None = None,
    network: str = "",
) -> Model:
    """The model in ``folder``, which holds a pipeline (``unet/``, ``scheduler/``) or the parts of one.

    The flat layout has ``config.json`` and the weights at the top and ``scheduler_config.json`` beside them or in
    ``scheduler/``. Weights are safetensors, or ``.bin`` files of tensors alone; nothing is downloaded. With a ``vae``
    or ``vqvae``, states are latents (LDMPipeline, arXiv 2112.10752). A network with ``num_class_embeds`` is
    class-conditional; ``options.fields = {"null_class": i}`` says that it was trained with class i as no class, which
    allows classifier-free guidance (scale 1 unless given) and leaves the other classes to be drawn; False: no class is.
    ``clip``: clamp x0 to [-1, 1]; None: of pixels. ``name`` defaults to the folder's. ``network``: name of the folder
    in it that holds the network, where that is another than ``unet``.
    ``ModelError`` where a part is missing or broken, or the model is of a kind not supported; ``ConfigError`` where
    an option does not suit the model.
    """
    options = options or Options()
    check_precision(precision)
    place = find_device(device)
    name = name or folder.resolve().name
    unet, decoder, kind = _find_parts(folder, network)
    given_clip = clip
    clip = choose_clip(clip, name, latent=decoder is not None)
    config, path = read_config(unet, [NETWORK]), unet / "config.json"
    shape = _check_network(config, path)
    conditions = _conditions(config, options, name, path, place)
    part = load_part(unet, NETWORK, config, precision if options.reduced else None)
    scheduler = load_scheduler(folder)
    if scheduler.filled.get("use_dynamic_shifting"):
        raise ModelError(
            f"{folder}: its scheduler shifts the noise by the size of the images (use_dynamic_shifting), but how a "
            f"{NETWORK} was trained with it is not known; save a scheduler with use_dynamic_shifting=false and a shift"
        )
    vae = load_vae(decoder, place, precision) if decoder else None
    net = part.network.to(place)

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        output: Tensor = net(x, model_times, class_labels=condition.get("label"), return_dict=False)[0]
        return output

    some = conditions.rows([0]) if conditions else UNCONDITIONAL
    units = trace_units(net, lambda x, t: predict(x, t, some), shape, place, precision, path)
    if options.compile:
        compile_units(units)
    guidance: GuidanceKind = "free" if conditions and conditions.negative else "none"
    denoiser = Denoiser(predict, scheduler.schedule, scheduler.prediction, place, precision, clip, units, guidance)
    fingerprint = digest(part.files, config, scheduler.config, *([{"vae": vae.digest}] if vae else []))
    model = Model(
        name,
        fingerprint,
        shape,
        scheduler.schedule,
        denoiser,
        place,
        units.names,
        latent_scale=vae.scale if vae else None,
        weights=weights_sample(part.network),
        conditions=conditions,
        guidance=guidance,
        scale=1.0 if options.guidance is None else options.guidance,
        decode=vae.decode if vae else None,
        encode=vae.encode if vae else None,
        image_shape=decoded_shape(vae, shape, path) if vae else None,
        kind=kind,
        notes=(
            *networks_beside(unet),
            *part.notes,
            *scheduler.notes,
            *(vae.notes if vae else ()),
            *_clip_notes(scheduler.filled, given_clip if vae is None else False),
            *_class_notes(path, conditions, options),
        ),
    )
    model.check_scale(options.guidance)
    return model


def _clip_notes(scheduler: Mapping[str, Any], clip: bool | None) -> Iterator[str]:
    """What was assumed of clipping; ``clip``: as it was given."""
    other = [
        f"{key} = {json.dumps(scheduler.get(key))}"
        for key, usual in CLIPS.items()
        if scheduler.get(key, usual) != usual
    ]
    if clip is None and other:
        yield f"x0 is clamped to [-1, 1], but the scheduler has {', '.join(other)}; set model.clip to say which"


def _class_notes(path: Path, conditions: Conditions | None, options: Options) -> Iterator[str]:
    if conditions is not None and "null_class" not in options.fields:
        yield (
            f"{path} does not say whether one of its {conditions.count} classes means no class; all are drawn. Say it: "
            "model.fields.null_class = NUMBER, or false for none"
        )


CLIPS = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
"""What a scheduler's config says of x0 where it is clamped to [-1, 1]."""


def _find_parts(folder: Path, network: str) -> tuple[Path, Path | None, str]:
    """Where the network lies, the decoder of latents if there is one, and what kind of model they make."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give one that diffusers' save_pretrained wrote")
    index = folder / "model_index.json"
    named = read_json(index) if index.is_file() else {}
    decoder = next((folder / part for part in DECODERS if part in named or (folder / part).is_dir()), None)
    unet = folder / network if network else folder / "unet" if (folder / "unet").is_dir() else folder
    return unet, decoder, str(named.get("_class_name", NETWORK))


def _check_network(config: Mapping[str, Any], path: Path) -> tuple[int, int, int]:
    """(C, H, W) of a config's states; ``ModelError`` where such a network is not supported."""
    if config.get("class_embed_type") is not None:
        raise ModelError(
            f"{path}: class_embed_type is {config['class_embed_type']!r}; only class labels (num_class_embeds, "
            "and no class_embed_type) are supported"
        )
    sides = sides_of(config.get("sample_size"), path)
    channels, out = config.get("in_channels"), config.get("out_channels")
    if not isinstance(channels, int) or out not in (channels, 2 * channels):
        raise ModelError(
            f"{path}: {channels} channels in and {out} out; expected as many out as in, "
            "or twice as many (learned variance)"
        )
    return channels, *sides


def _conditions(
    config: Mapping[str, Any], options: Options, name: str, path: Path, device: torch.device
) -> Conditions | None:
    """The classes to be drawn, all but the null class; None where the network is unconditional."""
    count, null = config.get("num_class_embeds"), options.fields.get("null_class")
    null = None if null is False else null
    check_options(options, name, () if count is None else ("fields",))
    if count is None:
        return None
    if type(count) is not int or count < 1:
        raise ModelError(f"{path}: num_class_embeds is {count!r}; set it to the number of classes, or leave it out")
    if unknown := options.fields.keys() - {"null_class"}:
        raise ConfigError(
            f"field {min(unknown)!r} is not for models such as {name!r}; model.fields may hold null_class"
        )
    if null is not None and (type(null) is not int or not 0 <= null < count):
        raise ConfigError(f"null_class = {null!r} is no class of {name!r}; use an integer in [0, {count - 1}]")
    labels = [label for label in range(count) if label != null]
    return label_conditions(labels, device, null, options.labels)
