"""Latent text-to-image models: Stable Diffusion 1.x and 2.x, SDXL, Stable Diffusion 3 and Flux."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from, first_line
from autodiffusion_optuna.evaluation.denoiser import (
    PRECISIONS,
    Condition,
    Denoiser,
    GuidanceKind,
    store_reduced,
    weights_sample,
)
from autodiffusion_optuna.evaluation.models import text
from autodiffusion_optuna.evaluation.models.base import (
    Conditions,
    Model,
    assemble,
    check_channels,
    check_unused,
    choose_clip,
    count_parameters,
    sides_of,
    trace_units,
)
from autodiffusion_optuna.evaluation.models.parts import (
    INDEX,
    Pipeline,
    build_network,
    check_fit,
    digest,
    fitting_weights,
    materialise,
    networks_beside,
    read_config,
    weights_by_file,
)
from autodiffusion_optuna.evaluation.models.prompts import read_prompts
from autodiffusion_optuna.evaluation.models.scheduler import Scheduler, load_scheduler
from autodiffusion_optuna.evaluation.models.single_file import read_single_file, training_facts
from autodiffusion_optuna.evaluation.models.vae import Vae, load_vae
from autodiffusion_optuna.files import read_json
from autodiffusion_optuna.noise import NoiseSchedule, flow

MARKED = ("prediction_type", "rescale_betas_zero_snr")
"""Of what a single file says of its training, what belongs to the scheduler."""

XL = "StableDiffusionXLPipeline"
META = torch.device("meta")


@dataclass(frozen=True)
class Kind:
    """What sets one of diffusers' pipelines apart.

    ``network``: class of what denoises. ``predict``: runs it. ``encode``: prompts into its
    condition. ``t5_length``: tokens of a prompt for T5. ``guidance``, ``scale``: the pipeline's defaults.
    ``patch``: side of the squares of a latent that the network takes as one token; 1 for UNets, which take any.
    ``largest_mu``: default of a dynamic shift; None where the schedule is one of betas.
    """

    network: str
    predict: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    encode: text.Encode
    guidance: GuidanceKind
    scale: float
    t5_length: int = 0
    patch: int = 1
    largest_mu: float | None = None

    @property
    def folder(self) -> str:
        """Where the pipeline keeps its network."""
        return "unet" if self.network.startswith("UNet") else "transformer"


def _predict_unet(network: nn.Module, x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
    added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]} if "sizes" in condition else None
    prediction: Tensor = network(
        x, model_times, encoder_hidden_states=condition["text"], added_cond_kwargs=added, return_dict=False
    )[0]
    return prediction


def _predict_sd3(network: nn.Module, x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
    prediction: Tensor = network(
        hidden_states=x,
        timestep=model_times,
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["pooled"],
        return_dict=False,
    )[0]
    return prediction


def _predict_flux(network: nn.Module, x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
    """States stay images; the network alone sees the sequence of their 2x2 squares."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    places = torch.zeros(height, width, 3, device=x.device)
    places[..., 1] = torch.arange(height, device=x.device)[:, None]
    places[..., 2] = torch.arange(width, device=x.device)
    packed: Tensor = network(
        hidden_states=pack(x),
        timestep=model_times / 1000,  # which the network multiplies by 1000
        guidance=condition.get("guidance"),
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["pooled"],
        txt_ids=torch.zeros(condition["text"].shape[1], 3, device=x.device),
        img_ids=places.reshape(-1, 3),
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def pack(x: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, h w, 4C]: each 2x2 square becomes one vector, channels first, as Flux takes them."""
    return functional.pixel_unshuffle(x, 2).flatten(2).mT.contiguous()


def unpack(sequence: Tensor, height: int, width: int) -> Tensor:
    """[B, height width, 4C] -> [B, C, 2 height, 2 width]; the inverse of ``pack``."""
    return functional.pixel_shuffle(sequence.mT.reshape(len(sequence), -1, height, width), 2)


PIPELINES: dict[str, Kind] = {
    "StableDiffusionPipeline": Kind("UNet2DConditionModel", _predict_unet, text.encode_sd, "free", 7.5),
    "StableDiffusionXLPipeline": Kind("UNet2DConditionModel", _predict_unet, text.encode_sdxl, "free", 5.0),
    "StableDiffusion3Pipeline": Kind(
        "SD3Transformer2DModel", _predict_sd3, text.encode_sd3, "free", 7.0, text.SD3_LENGTH, 2, 1.16
    ),
    "FluxPipeline": Kind(
        "FluxTransformer2DModel", _predict_flux, text.encode_flux, "embedded", 3.5, text.FLUX_LENGTH, 2, 1.15
    ),
}
"""Class of a pipeline -> how it is run."""


def load_text_to_image(
    config: ModelConfig, device: torch.device, pipeline: Pipeline, name: str, file: Path | None = None
) -> Model:
    """A text-to-image pipeline as diffusers saves it, of a class in ``PIPELINES``.

    ``model.prompts`` are encoded by the pipeline's text encoders as images of them are drawn; in between the encoders
    are dropped. Each prompt is cut to the length the pipeline cuts it to. ``model.negative_prompt``: empty means the
    pipeline's default, which is zero for SDXL. States are latents, so ``model.clip`` cannot be true.
    ``file``: one safetensors file in its authors' layout, from which the denoising network is taken instead.
    Nothing is downloaded. ``ConfigError`` where a setting is missing or wrong, ``ModelError`` where the pipeline or the
    device cannot be used.
    """
    folder = pipeline.folder
    clip = choose_clip(config.clip, name, latent=True)
    if config.prompts is None:
        raise ConfigError(
            f"model {name!r} draws images of prompts; set model.prompts=FILE (txt, csv, jsonl or COCO captions json)"
        )
    prompts = read_prompts(Path(config.prompts))
    kind = _find_kind(pipeline)
    path = folder / (pipeline.network or kind.folder) / "config.json"
    stored = read_config(path.parent, (kind.network,))
    network = build_network(kind.network, stored, path, META)
    guidance = find_guidance(network, kind, path)
    used = {"prompts", "size", *(["negative_prompt"] if guidance == "free" else []), *(["config"] if file else [])}
    check_unused(config, name, used)
    facts = training_facts(file) if file else {}
    vae = load_vae(folder / "vae", device, config.precision, facts.get("scaling_factor"), usual=True)
    shape = latent_shape(network, kind, vae, config.size, path)
    image_shape = vae.image_shape(shape, path)
    files, said = ([file], list[str]()) if file else fitting_weights(network, path.parent, stored)
    scheduler = load_scheduler(folder, {key: facts[key] for key in MARKED if key in facts})
    schedule = find_schedule(scheduler, shape, kind, folder / "scheduler")
    texts = Texts(
        load=partial(text.load_encoders, pipeline, dtype=PRECISIONS[config.precision], t5_length=kind.t5_length),
        digest=partial(text.encoders_digest, pipeline),
        zeros=pipeline.kind == XL and pipeline.index.get("force_zeros_for_empty_prompt", True),
    )
    # Autocast rounds embeddings to its precision before their first product, so they may as well be kept in it.
    dtype = PRECISIONS[config.precision]
    conditions = text_conditions(config, kind, texts, prompts, network.config, dtype, device, guidance, image_shape)
    predict = partial(kind.predict, network)
    some = {key: torch.empty(tensor.shape, device=META) for key, tensor in conditions.rows([0]).items()}
    some |= {"guidance": torch.empty(1, device=META)} if guidance == "embedded" else {}
    units = trace_units(network, lambda x, t: predict(x, t, some), shape, META, "float32", path)
    _reduce(network, config.precision)
    if file is None:
        materialise(network, weights_by_file(network, files), device)
        said += networks_beside(path.parent)
    else:
        weights, said = read_single_file(file, kind.network, folder, kind.folder, PRECISIONS[config.precision])
        check_fit(network, weights, file)
        materialise(network, [weights], device)
    denoiser = Denoiser(predict, schedule, scheduler.prediction, device, config.precision, clip, units, guidance)
    return assemble(
        config,
        denoiser,
        vae,
        name=name,
        fingerprint=digest(files, stored, scheduler.config, {"pipeline": pipeline.kind, "vae": vae.digest}),
        shape=shape,
        weights=weights_sample(network),
        parameters=count_parameters(network),
        conditions=conditions,
        scale=1.0 if guidance == "none" else kind.scale,
        image_shape=image_shape,
        kind=pipeline.kind,
        notes=(*scheduler.notes, *vae.notes, *_notes(config, pipeline, stored, facts, scheduler), *said),
    )


def _notes(
    config: ModelConfig,
    pipeline: Pipeline,
    stored: Mapping[str, Any],
    facts: Mapping[str, Any],
    scheduler: Scheduler,
) -> Iterator[str]:
    """What the files do not say and was assumed, and where a single file's ``facts`` are others than those used."""
    path = pipeline.folder / "vae" / "config.json"
    decoder = read_json(path)
    if PIPELINES[pipeline.kind].largest_mu is not None and decoder.get("shift_factor") is None:
        yield f"{path} gives no shift_factor of latents; assumed is 0"
    trained, given = facts.get("scaling_factor"), decoder.get("scaling_factor")
    if trained and given and not math.isclose(trained, given, rel_tol=1e-4):
        yield f"the checkpoint was trained on latents scaled by {trained:g}; {path} says {given:g}, which is used"
    levels, own = facts.get("alphas_cumprod"), scheduler.schedule.alphas**2
    if levels is not None and not (levels.shape == own.shape and np.allclose(levels[:-1], own[:-1], rtol=1e-2)):
        yield "the checkpoint holds other noise levels (alphas_cumprod) than those of the scheduler, which are used"
    if stored.get("sample_size") is None and config.size is None:
        yield "the network's config gives no sample_size; images have the pipeline's usual one unless model.size is set"
    zeros = "force_zeros_for_empty_prompt"
    if pipeline.kind == XL and not config.negative_prompt and zeros not in pipeline.index:
        yield f"{pipeline.folder / INDEX} does not say {zeros}; assumed is true, the default of its class"


def _find_kind(pipeline: Pipeline) -> Kind:
    """How a pipeline is run, which may be the one in ``model.config``."""
    if not pipeline.index:
        raise ModelError(f"{pipeline.folder}: no {INDEX}; give a folder to which diffusers saved a whole pipeline")
    if pipeline.kind not in PIPELINES:
        raise ModelError(
            f"{pipeline.folder / INDEX}: {choose_from('text-to-image pipeline', pipeline.kind, PIPELINES)}"
        )
    return PIPELINES[pipeline.kind]


def latent_shape(
    network: nn.Module, kind: Kind, vae: Vae, size: Sequence[int] | None, path: Path | str
) -> tuple[int, int, int]:
    """(C, h, w) of a latent for images of ``size``, or the model's own; ``path`` of the network's config."""
    config: Any = network.config
    packed = 4 if kind.network == "FluxTransformer2DModel" else 1
    out = config.out_channels or config.in_channels
    channels = check_channels(config.in_channels // packed, out // packed, path)
    # Flux has no size of its own, and its pipeline takes 128.
    own = [side * vae.factor for side in sides_of(config.get("sample_size", 128), path)]
    height, width = size or own
    unit = vae.factor * kind.patch
    if height % unit or width % unit:
        raise ConfigError(f"model.size is {height} x {width}; use multiples of {unit} for this model")
    largest = config.get("pos_embed_max_size")
    if largest is not None and max(height, width) > largest * unit:
        raise ConfigError(f"model.size is {height} x {width}; this model's sides go up to {largest * unit}")
    return channels, height // vae.factor, width // vae.factor


def find_guidance(network: nn.Module, kind: Kind, path: Path | str) -> GuidanceKind:
    """How the network is guided; ``path`` of its config."""
    config: Any = network.config
    if config.get("time_cond_proj_dim") is not None:
        raise ModelError(
            f"{path}: time_cond_proj_dim is {config.time_cond_proj_dim}, so the network embeds its guidance as latent "
            "consistency models do; only undistilled UNets are supported"
        )
    # Flux schnell was distilled further, and takes no scale.
    return "none" if kind.guidance == "embedded" and not config.guidance_embeds else kind.guidance


def find_schedule(scheduler: Scheduler, shape: tuple[int, int, int], kind: Kind, where: Path | str) -> NoiseSchedule:
    """The schedule of a scheduler, found in ``where``, for latents of ``shape``: flows may be shifted by their size."""
    if kind.largest_mu is None:
        return scheduler.schedule
    config = scheduler.filled
    if scheduler.prediction != "flow_prediction" or config.get("invert_sigmas"):
        raise ModelError(
            f"{where}: {config.get('_class_name')} with prediction_type {scheduler.prediction!r} and invert_sigmas "
            f"{config.get('invert_sigmas', False)} is not what this pipeline was trained with; use its own scheduler"
        )
    try:
        shift = flow_shift(config, shape[1] * shape[2] // kind.patch**2, kind.largest_mu)
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"the noise levels would be shifted by {shift:g}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{where}: {first_line(error)}; copy its config again") from error
    return flow(scheduler.schedule.T, shift, scheduler.schedule.T)


def flow_shift(config: Mapping[str, Any], tokens: int, largest_mu: float) -> float:
    """Shift of ``noise.flow`` for images of so many tokens, from the config of a flow-matching scheduler.

    A dynamic shift grows with the image: mu is linear in the tokens, and the shift is exp(mu), or mu itself where
    ``time_shift_type`` is linear (as in diffusers' pipelines; the shift itself is arXiv 2403.03206, eq. 23).
    ``largest_mu``: mu at ``max_image_seq_len`` where the config does not say.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", largest_mu)
    mu = low + (high - low) * (tokens - short) / (long - short)
    return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)


@dataclass(frozen=True, eq=False)
class Texts:
    """What makes conditions of prompts.

    ``load``: the text encoders on a device. ``digest``: of them. ``zeros``: whether an empty negative prompt is zero.
    """

    load: Callable[[torch.device], text.Encoders]
    digest: Callable[[], str]
    zeros: bool


def text_conditions(
    config: ModelConfig,
    kind: Kind,
    texts: Texts,
    prompts: Sequence[str],
    network: Any,
    dtype: torch.dtype,
    device: torch.device,
    guidance: GuidanceKind,
    image_shape: tuple[int, int, int],
) -> Conditions:
    """``prompts`` for a network of the config ``network``, encoded as they are drawn, and what guidance leads from.

    Encoded ones are kept in ``dtype``.
    """
    cache = text.PromptCache(texts.load, kind.encode, network, dtype, device)
    cache.prepare([config.negative_prompt, prompts[0]])  # a part that does not fit shows now
    away = cache.rows([config.negative_prompt])
    if texts.zeros and not config.negative_prompt:
        away = {key: torch.zeros_like(tensor) for key, tensor in away.items()}
    sizes = torch.tensor([[*image_shape[1:], 0, 0, *image_shape[1:]]], dtype=torch.float32, device=device)
    # Of SDXL: the image's size before it was cropped, the corner of the crop, and the size wanted.
    beside = {"sizes": sizes} if kind.encode is text.encode_sdxl else {}

    def repeated(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        return {key: tensor.expand(count, *tensor.shape[1:]) for key, tensor in tensors.items()}

    def rows(chosen: Sequence[int]) -> Condition:
        return {**cache.rows([prompts[i] for i in chosen]), **repeated(beside, len(chosen))}

    def negative(count: int) -> Condition:
        return repeated({**away, **beside}, count)

    def prepare(chosen: Iterable[int]) -> None:
        cache.prepare(prompts[i] for i in chosen)

    free = guidance == "free"
    described = json.dumps([prompts, config.negative_prompt if free else "", config.labels, texts.digest()])
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    return Conditions("prompts", len(prompts), rows, negative if free else None, fingerprint, config.labels, prepare)


def _reduce(network: nn.Module, precision: str) -> None:
    """``store_reduced``, and the same for RMSNorm, which is fast only where its input and weight are of one type."""
    store_reduced(network, precision)
    for module in network.modules():
        if isinstance(module, nn.RMSNorm) and module.weight is not None:
            module.weight.data = module.weight.data.to(PRECISIONS[precision])
