"""Models from a local folder that diffusers saved: a UNet2DModel, or a DiT (arXiv 2212.09748)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.denoiser import UNCONDITIONAL, Condition, Denoiser, weights_sample
from autodiffusion_optuna.evaluation.models.base import (
    Conditions,
    Model,
    assemble,
    check_channels,
    check_unused,
    choose_clip,
    count_parameters,
    label_conditions,
    sides_of,
    trace_units,
)
from autodiffusion_optuna.evaluation.models.parts import Pipeline, digest, load_part, networks_beside, read_config
from autodiffusion_optuna.evaluation.models.scheduler import Scheduler, load_scheduler
from autodiffusion_optuna.evaluation.models.vae import Vae, load_vae

UNET, DIT = "UNet2DModel", "DiTTransformer2DModel"
NAMES = {UNET: (UNET,), DIT: (DIT, "Transformer2DModel")}
"""Class of a network -> those that a config may name; a DiT's older one is what diffusers called others as well."""

DIT_DEFAULTS = {"in_channels": 4, "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero"}
DIT_SCALE = 4.0
"""Guidance of the paper's samples and of DiTPipeline; the paper's best FID is at 1.5."""

DECODERS = ("vae", "vqvae")
"""Names that pipelines give the part that decodes latents."""

CLIPS = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
"""What a scheduler's config says of x0 where it is clamped to [-1, 1]."""


def load_folder(config: ModelConfig, device: torch.device, pipeline: Pipeline, name: str) -> Model:
    """The model in a folder, which holds a pipeline (``unet/`` or ``transformer/``, ``scheduler/``) or its parts.

    The flat layout has ``config.json`` and the weights at the top and ``scheduler_config.json`` beside them or in
    ``scheduler/``. Weights are safetensors, or ``.bin`` files of tensors alone; nothing is downloaded. With a ``vae``
    or ``vqvae``, states are latents (LDMPipeline, arXiv 2112.10752). A UNet with ``num_class_embeds`` is
    class-conditional; ``model.fields.null_class`` says that it was trained with that class as no class, which allows
    classifier-free guidance and leaves the other classes to be drawn; False: no class is.

    Of a DiT the label after the last, 1000 for ImageNet, is that of no class. All its latent channels are guided, as in
    DiTPipeline; the published code guides the first three only. A learned variance is dropped.
    ``ModelError`` where a part is missing or broken, or the model is of a kind not supported; ``ConfigError`` where
    a setting does not suit the model.
    """
    kind = DIT if pipeline.kind == "DiTPipeline" else UNET
    folder, decoder = _find_network(pipeline, kind), _find_decoder(pipeline, kind)
    clip = choose_clip(config.clip, name, latent=decoder is not None)
    stored, path = read_config(folder, NAMES[kind]), folder / "config.json"
    facts = {**DIT_DEFAULTS, **stored} if kind == DIT else stored
    shape = state_shape(facts, kind, path)
    conditions = class_conditions(facts, kind, config, name, path, device)
    network, files, notes = load_part(folder, kind, stored, config.precision)
    scheduler = load_scheduler(pipeline.folder)
    vae = load_vae(decoder, device, config.precision, usual=kind == DIT) if decoder else None
    network.to(device)
    return make_model(
        config,
        network,
        Described(path, shape, clip, conditions, scheduler, vae),
        device=device,
        name=name,
        fingerprint=digest(files, stored, scheduler.config, {"vae": vae and vae.digest}),
        kind=pipeline.kind or kind,
        notes=(*networks_beside(folder), *notes),
    )


@dataclass(frozen=True, eq=False)
class Described:
    """What is known of a network besides itself. ``where`` stands for its config in messages; the rest as ``Model``."""

    where: Path | str
    shape: tuple[int, int, int]
    clip: bool
    conditions: Conditions | None
    scheduler: Scheduler
    vae: Vae | None


def make_model(
    config: ModelConfig, network: Any, known: Described, *, device: torch.device, notes: Sequence[str], **facts: Any
) -> Model:
    """The model of a network that is on its device: a UNet2DModel or a DiT.

    ``notes``: what its loader has to say. ``facts``: ``name``, ``fingerprint`` and ``kind`` of the ``Model``.
    """
    scheduler, conditions, vae, where = known.scheduler, known.conditions, known.vae, known.where
    unet = UNET in (base.__name__ for base in type(network).__mro__)
    if scheduler.filled.get("use_dynamic_shifting"):
        raise ModelError(
            f"{where}: its scheduler shifts the noise by the size of the images (use_dynamic_shifting), but how a "
            f"{type(network).__name__} was trained with it is not known; use a scheduler with "
            "use_dynamic_shifting=false and a shift"
        )

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        x, label = x.to(network.dtype), condition.get("label")
        output: Tensor = network(x, model_times, class_labels=label, return_dict=False)[0]
        return output

    some = conditions.rows([0]) if conditions else UNCONDITIONAL
    units = trace_units(network, lambda x, t: predict(x, t, some), known.shape, device, config.precision, where)
    said = [*notes, *scheduler.notes, *(vae.notes if vae else _clip_notes(scheduler.filled, config.clip))]
    if unet and conditions is not None and "null_class" not in config.fields:
        said.append(
            f"{where} does not say whether one of its {conditions.count} classes means no class; all are drawn. Say "
            "it: model.fields.null_class = NUMBER, or false for none"
        )
    guided = conditions is not None and conditions.negative is not None
    denoiser = Denoiser(
        predict,
        scheduler.schedule,
        scheduler.prediction,
        device,
        config.precision,
        known.clip,
        units,
        "free" if guided else "none",
    )
    return assemble(
        config,
        denoiser,
        vae,
        shape=known.shape,
        weights=weights_sample(network),
        parameters=count_parameters(network),
        conditions=conditions,
        scale=1.0 if unet else DIT_SCALE,
        image_shape=vae.image_shape(known.shape, where) if vae else None,
        notes=tuple(said),
        **facts,
    )


def _find_network(pipeline: Pipeline, kind: str) -> Path:
    folder = pipeline.folder / (pipeline.network or ("transformer" if kind == DIT else "unet"))
    flat = kind == UNET and not pipeline.network and not folder.is_dir()
    return pipeline.folder if flat else folder


def _find_decoder(pipeline: Pipeline, kind: str) -> Path | None:
    folders = [pipeline.folder / part for part in DECODERS]
    return next((path for path in folders if kind == DIT or path.name in pipeline.index or path.is_dir()), None)


def state_shape(facts: Mapping[str, Any], kind: str, path: Path | str) -> tuple[int, int, int]:
    """(C, H, W) of a config's states; ``ModelError`` where such a network is not supported."""
    channels, out = facts.get("in_channels"), facts.get("out_channels")
    if kind == DIT:
        out = out or channels
        norm, text = facts["norm_type"], facts.get("cross_attention_dim")
        if norm != "ada_norm_zero" or text is not None:
            raise ModelError(
                f"{path}: norm_type is {norm!r} and cross_attention_dim {text!r}; only a DiT is supported, with "
                "'ada_norm_zero' and none"
            )
    elif facts.get("class_embed_type") is not None:
        raise ModelError(
            f"{path}: class_embed_type is {facts['class_embed_type']!r}; only class labels (num_class_embeds, "
            "and no class_embed_type) are supported"
        )
    sides = sides_of(facts.get("sample_size"), path)
    return check_channels(channels, out, path), *sides


def class_conditions(
    facts: Mapping[str, Any], kind: str, config: ModelConfig, name: str, path: Path | str, device: torch.device
) -> Conditions | None:
    """The classes to be drawn, all but the null class; None where the network is unconditional."""
    field = "num_embeds_ada_norm" if kind == DIT else "num_class_embeds"
    count = facts.get(field)
    check_unused(config, name, ("fields",) if kind == UNET and count is not None else ())
    if count is None and kind == UNET:
        return None
    if type(count) is not int or count < 1:
        raise ModelError(f"{path}: {field} is {count!r}; set it to the number of classes, or leave it out")
    if kind == DIT:
        return label_conditions(range(count), device, count, config.labels)
    if unknown := config.fields.keys() - {"null_class"}:
        raise ConfigError(
            f"field {min(unknown)!r} is not for models such as {name!r}; model.fields may hold null_class"
        )
    null = config.fields.get("null_class", False)
    if null is False:
        return label_conditions(range(count), device, None, config.labels)
    if type(null) is not int or not 0 <= null < count:
        raise ConfigError(f"null_class = {null!r} is no class of {name!r}; use an integer in [0, {count - 1}]")
    return label_conditions([label for label in range(count) if label != null], device, null, config.labels)


def _clip_notes(scheduler: Mapping[str, Any], clip: bool | None) -> Iterator[str]:
    """What was assumed of clipping; ``clip``: as it was given."""
    other = [
        f"{key} = {json.dumps(scheduler.get(key))}"
        for key, usual in CLIPS.items()
        if scheduler.get(key, usual) != usual
    ]
    if clip is None and other:
        yield f"x0 is clamped to [-1, 1], but the scheduler has {', '.join(other)}; set model.clip to say which"
