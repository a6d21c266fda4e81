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

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.denoiser import (
    PRECISIONS,
    Condition,
    Denoiser,
    GuidanceKind,
    Network,
    store_reduced,
    weights_sample,
)
from autodiffusion_optuna.evaluation.models.base import Conditions, Model, Options, find_device
from autodiffusion_optuna.evaluation.models.checks import check_options, choose_clip, decoded_shape, sides_of
from autodiffusion_optuna.evaluation.models.meta_loading import (
    blueprint,
    check_fit,
    each_file,
    materialise,
    read_single_file,
    stored_shapes,
    training_facts,
)
from autodiffusion_optuna.evaluation.models.parts import (
    Scheduler,
    digest,
    find_weights,
    first_line,
    load_scheduler,
    network_notes,
    networks_beside,
    read_config,
    read_json,
)
from autodiffusion_optuna.evaluation.models.prompts import read_prompts
from autodiffusion_optuna.evaluation.models.text import (
    FLUX_LENGTH,
    SD3_LENGTH,
    Encode,
    PromptCache,
    encode_flux,
    encode_sd,
    encode_sd3,
    encode_sdxl,
    encoders_digest,
    load_encoders,
)
from autodiffusion_optuna.evaluation.models.vae import AUTOENCODERS, Vae, load_vae
from autodiffusion_optuna.evaluation.skip import Units, compile_units, find_units
from autodiffusion_optuna.evaluation.tensors import Weights
from autodiffusion_optuna.noise import NoiseSchedule, flow

Notes = tuple[str, ...]

Size = tuple[int, int]
"""(height, width)."""

MARKED = ("prediction_type", "rescale_betas_zero_snr")
"""Of what a single file says of its training, what belongs to the scheduler."""


@dataclass(frozen=True)
class _Pipeline:
    """What sets one of diffusers' pipelines apart.

    ``network``, ``folder``: class and folder of what denoises. ``adapt``: makes it a ``Network``. ``encode``: prompts
    into its condition. ``t5_length``: tokens of a prompt for T5. ``guidance``, ``scale``: the pipeline's defaults.
    ``patch``: side of the squares of a latent that the network takes as one token; 1 for UNets, which take any.
    ``largest_mu``: default of a dynamic shift; None where the schedule is one of betas.
    """

    network: str
    folder: str
    adapt: Callable[[nn.Module], Network]
    encode: Encode
    guidance: GuidanceKind
    scale: float
    t5_length: int = 0
    patch: int = 1
    largest_mu: float | None = None


def _adapt_unet(network: nn.Module) -> Network:
    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]} if "sizes" in condition else None
        prediction: Tensor = network(
            x, model_times, encoder_hidden_states=condition["text"], added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction

    return predict


def _adapt_sd3(network: nn.Module) -> Network:
    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = network(
            hidden_states=x,
            timestep=model_times,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return prediction

    return predict


def _adapt_flux(network: nn.Module) -> Network:
    """States stay images; the network alone sees the sequence of their 2x2 squares."""

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
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

    return predict


def pack(x: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, h w, 4C]: each 2x2 square becomes one vector, channels first, as Flux takes them."""
    b, c, height, width = x.shape
    squares = x.reshape(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(b, height * width // 4, 4 * c)


def unpack(sequence: Tensor, height: int, width: int) -> Tensor:
    """[B, height width, 4C] -> [B, C, 2 height, 2 width]; the inverse of ``pack``."""
    b, _, c = sequence.shape
    squares = sequence.reshape(b, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(b, c // 4, 2 * height, 2 * width)


PIPELINES: dict[str, _Pipeline] = {
    "StableDiffusionPipeline": _Pipeline("UNet2DConditionModel", "unet", _adapt_unet, encode_sd, "free", 7.5),
    "StableDiffusionXLPipeline": _Pipeline("UNet2DConditionModel", "unet", _adapt_unet, encode_sdxl, "free", 5.0),
    "StableDiffusion3Pipeline": _Pipeline(
        "SD3Transformer2DModel", "transformer", _adapt_sd3, encode_sd3, "free", 7.0, SD3_LENGTH, 2, 1.16
    ),
    "FluxPipeline": _Pipeline(
        "FluxTransformer2DModel", "transformer", _adapt_flux, encode_flux, "embedded", 3.5, FLUX_LENGTH, 2, 1.15
    ),
}
"""Class of a pipeline -> how it is run."""


def load_text_to_image(
    folder: Path, device: str, precision: str, clip: bool | None, name: str, options: Options, network: str = ""
) -> Model:
    """The text-to-image pipeline in ``folder``, as diffusers saves it; a key of ``PIPELINES``.

    ``options.prompts`` are encoded by the pipeline's text encoders as images of them are drawn; in between the encoders
    are dropped. Each prompt is cut to the length the pipeline cuts it to. ``options.negative_prompt``: empty means the
    pipeline's default, which is zero for SDXL. ``options.size`` is the model's own where it is None. States are
    latents, so ``clip`` cannot be True. ``network``: folder in it of what denoises, where it is not the pipeline's own.
    Nothing is downloaded. ``ConfigError`` where an option is missing or wrong, ``ModelError`` where the pipeline or the
    device cannot be used.
    """
    return _load(folder, None, device, precision, clip, name, options, network)


def load_single_file(path: Path, device: str, precision: str, clip: bool | None, name: str, options: Options) -> Model:
    """As ``load_text_to_image``, with the denoising network from one safetensors file in its authors' layout.

    Everything else, the decoder and the text encoders too, comes from the pipeline in the folder
    ``options.config``; ``ConfigError`` where it is not given.
    """
    if options.config is None:
        raise ConfigError(
            f"{path}: a single file holds neither configs nor a noise schedule; set model.config to the folder of a "
            "diffusers pipeline of the same kind"
        )
    return _load(options.config, path, device, precision, clip, name, options)


def _load(
    folder: Path,
    file: Path | None,
    device: str,
    precision: str,
    clip: bool | None,
    name: str,
    options: Options,
    part: str = "",
) -> Model:
    try:
        return _assemble(folder, file, device, precision, clip, name, options, part)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{folder}: the device has too little memory for this model; keep its weights in a lower precision "
            "(model.precision, model.reduced), or use another device"
        ) from None


def _assemble(
    folder: Path,
    file: Path | None,
    device: str,
    precision: str,
    clip: bool | None,
    name: str,
    options: Options,
    part: str,
) -> Model:
    place = find_device(device)
    if precision not in PRECISIONS:
        raise ConfigError(choose_from("precision", precision, PRECISIONS))
    clip = choose_clip(clip, name, latent=True)
    prompts = _read_prompts(name, options)
    index = _read_index(folder)
    pipeline = PIPELINES[index["_class_name"]]
    path = folder / (part or pipeline.folder) / "config.json"
    config = read_config(path.parent, (pipeline.network,))
    network = blueprint(pipeline.network, config, path)
    guidance = _guidance(network, pipeline, path)
    scale = _scale(pipeline, guidance, options, name)
    negative, beside = ("negative_prompt",) if guidance == "free" else (), ("config",) if file else ()
    check_options(options, name, ("prompts", "size", *negative, *beside))
    facts = training_facts(file) if file else {}
    given = "scaling_factor" in read_config(folder / "vae", AUTOENCODERS)
    vae = load_vae(folder / "vae", place, precision, None if given else facts.get("scaling_factor"), usual=True)
    shape = _latent_shape(network, pipeline, vae, options.size, path)
    image_shape = decoded_shape(vae, shape, path)
    files = [file] if file else find_weights(path.parent)
    training: list[str] = []
    if file is None:
        check_fit(network, stored_shapes(files, training), files[0], path.name)
    scheduler = load_scheduler(folder, {key: value for key, value in facts.items() if key in MARKED})
    schedule = scheduler.schedule
    if pipeline.largest_mu is not None:
        schedule = _flow_schedule(scheduler, shape, pipeline.patch, pipeline.largest_mu, folder / "scheduler")

    conditions = _conditions(folder, index, prompts, network, place, precision, guidance, image_shape, options)
    predict = pipeline.adapt(network)
    units = _find_units(network, predict, shape, conditions, guidance, path)
    if options.reduced:
        _reduce(network, precision)
    notes = [*scheduler.notes, *vae.notes, *_notes(folder, config, index, options, facts, scheduler)]
    if file is None:
        notes += [*training, *networks_beside(path.parent), *network_notes(path.parent, config, network, files)]
        materialise(network, each_file(network, files), place)
    else:
        dtype = PRECISIONS[precision] if options.reduced else torch.float32
        weights, said = _read_single_file(file, network, pipeline, folder, dtype)
        materialise(network, [weights], place)
        notes += said
    if options.compile:
        compile_units(units)
    return Model(
        name,
        digest(files, config, scheduler.config, {"pipeline": index["_class_name"], "vae": vae.digest}),
        shape,
        schedule,
        Denoiser(predict, schedule, scheduler.prediction, place, precision, clip, units, guidance),
        place,
        units.names,
        latent_scale=vae.scale,
        weights=weights_sample(network),
        conditions=conditions,
        guidance=guidance,
        scale=scale,
        decode=vae.decode,
        encode=vae.encode,
        image_shape=image_shape,
        kind=index["_class_name"],
        notes=tuple(notes),
    )


def _notes(
    folder: Path,
    config: Mapping[str, Any],
    index: Mapping[str, Any],
    options: Options,
    facts: Mapping[str, Any],
    scheduler: Scheduler,
) -> Iterator[str]:
    """What the files do not say and was assumed, and where a single file's ``facts`` are others than those used."""
    decoder = folder / "vae" / "config.json"
    stored = read_json(decoder)
    if PIPELINES[index["_class_name"]].largest_mu is not None and stored.get("shift_factor") is None:
        yield f"{decoder} gives no shift_factor of latents; assumed is 0"
    trained, given = facts.get("scaling_factor"), stored.get("scaling_factor")
    if trained and given and not math.isclose(trained, given, rel_tol=1e-4):
        yield f"the checkpoint was trained on latents scaled by {trained:g}; {decoder} says {given:g}, which is used"
    levels, own = facts.get("alphas_cumprod"), scheduler.schedule.alphas**2
    if levels is not None and not (levels.shape == own.shape and np.allclose(levels[:-1], own[:-1], rtol=1e-2)):
        yield "the checkpoint holds other noise levels (alphas_cumprod) than those of the scheduler, which are used"
    if config.get("sample_size") is None and options.size is None:
        yield "the network's config gives no sample_size; images have the pipeline's usual one unless model.size is set"
    zeros = "force_zeros_for_empty_prompt"
    if index["_class_name"] == "StableDiffusionXLPipeline" and not options.negative_prompt and zeros not in index:
        yield f"{folder / 'model_index.json'} does not say {zeros}; assumed is true, the default of its class"


def _read_prompts(name: str, options: Options) -> tuple[str, ...]:
    if options.prompts is None:
        raise ConfigError(
            f"model {name!r} draws images of prompts; set model.prompts=FILE (txt, csv, jsonl or COCO captions json)"
        )
    return read_prompts(options.prompts)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no {path.name}; give a folder to which diffusers saved a whole pipeline")
    index = read_json(path)
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise ModelError(f"{path}: {choose_from('text-to-image pipeline', kind, PIPELINES)}")
    return index


def _latent_shape(
    network: nn.Module, pipeline: _Pipeline, vae: Vae, size: Size | None, path: Path
) -> tuple[int, int, int]:
    """(C, h, w) of a latent for images of ``size``, or the model's own; ``path`` of the network's config."""
    config: Any = network.config
    packed = 4 if pipeline.network == "FluxTransformer2DModel" else 1
    channels, out = config.in_channels // packed, (config.out_channels or config.in_channels) // packed
    if out not in (channels, 2 * channels):
        raise ModelError(
            f"{path}: {channels} channels in and {out} out; only plain text-to-image networks are supported, with as "
            "many out as in"
        )
    # Flux has no size of its own, and its pipeline takes 128.
    own = [side * vae.factor for side in sides_of(config.get("sample_size", 128), path)]
    height, width = size or own
    unit = vae.factor * pipeline.patch
    if min(height, width) <= 0 or height % unit or width % unit:
        raise ConfigError(f"model.size is {height} x {width}; use multiples of {unit} for this model")
    largest = config.get("pos_embed_max_size")
    if largest is not None and max(height, width) > largest * unit:
        raise ConfigError(f"model.size is {height} x {width}; this model's sides go up to {largest * unit}")
    return channels, height // vae.factor, width // vae.factor


def _guidance(network: nn.Module, pipeline: _Pipeline, path: Path) -> GuidanceKind:
    """How the network is guided; ``path`` of its config."""
    config: Any = network.config
    if config.get("time_cond_proj_dim") is not None:
        raise ModelError(
            f"{path}: time_cond_proj_dim is {config.time_cond_proj_dim}, so the network embeds its guidance as latent "
            "consistency models do; only undistilled UNets are supported"
        )
    # Flux schnell was distilled further, and takes no scale.
    return "none" if pipeline.guidance == "embedded" and not config.guidance_embeds else pipeline.guidance


def _scale(pipeline: _Pipeline, guidance: GuidanceKind, options: Options, name: str) -> float:
    if guidance == "none" and options.guidance is not None:
        raise ConfigError(
            f"guidance {options.guidance:g} was given, but {name!r} was distilled to need none; leave guidance out"
        )
    default = 1.0 if guidance == "none" else pipeline.scale
    return default if options.guidance is None else options.guidance


def _flow_schedule(
    scheduler: Scheduler, shape: tuple[int, int, int], patch: int, largest_mu: float, where: Path
) -> NoiseSchedule:
    """The schedule of a flow-matching scheduler, found in ``where``, for latents of ``shape``."""
    config = scheduler.filled
    if scheduler.prediction != "flow_prediction" or config.get("invert_sigmas"):
        raise ModelError(
            f"{where}: {config.get('_class_name')} with prediction_type {scheduler.prediction!r} and invert_sigmas "
            f"{config.get('invert_sigmas', False)} is not what this pipeline was trained with; use its own scheduler"
        )
    try:
        shift = flow_shift(config, shape[1] * shape[2] // patch**2, largest_mu)
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"the noise levels would be shifted by {shift:g}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{where}: {first_line(error)}; copy its config anew") from error
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


def _conditions(
    folder: Path,
    index: Mapping[str, Any],
    prompts: Sequence[str],
    network: nn.Module,
    device: torch.device,
    precision: str,
    guidance: GuidanceKind,
    image_shape: tuple[int, int, int],
    options: Options,
) -> Conditions:
    """``prompts`` for ``network``, encoded as they are drawn, and what guidance leads away from."""
    pipeline, dtype = PIPELINES[index["_class_name"]], PRECISIONS[precision]
    xl = index["_class_name"] == "StableDiffusionXLPipeline"
    encoder_dtype = dtype if options.reduced else torch.float32
    load = partial(load_encoders, folder, index, dtype=encoder_dtype, t5_length=pipeline.t5_length)
    # Autocast rounds embeddings to its precision before their first product, so they may as well be kept in it.
    cache = PromptCache(load, pipeline.encode, network.config, dtype, device)
    cache.prepare([options.negative_prompt, prompts[0]])  # a part that does not fit shows now
    away = cache.rows([options.negative_prompt])
    if xl and not options.negative_prompt and index.get("force_zeros_for_empty_prompt", True):
        away = {key: torch.zeros_like(tensor) for key, tensor in away.items()}
    sizes = torch.tensor([[*image_shape[1:], 0, 0, *image_shape[1:]]], dtype=torch.float32, device=device)
    # Of SDXL: the image's size before it was cropped, the corner of the crop, and the size wanted.
    beside = {"sizes": sizes} if xl else {}

    def repeated(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        return {key: tensor.expand(count, *tensor.shape[1:]) for key, tensor in tensors.items()}

    def rows(chosen: Sequence[int]) -> Condition:
        return {**cache.rows([prompts[i] for i in chosen]), **repeated(beside, len(chosen))}

    def negative(count: int) -> Condition:
        return repeated({**away, **beside}, count)

    def prepare(chosen: Iterable[int]) -> None:
        cache.prepare(prompts[i] for i in chosen)

    free = guidance == "free"
    told = [prompts, options.negative_prompt if free else "", options.labels, encoders_digest(folder, index)]
    fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return Conditions("prompts", len(prompts), rows, negative if free else None, fingerprint, options.labels, prepare)


def _find_units(
    network: nn.Module,
    predict: Network,
    shape: tuple[int, int, int],
    conditions: Conditions,
    guidance: GuidanceKind,
    path: Path,
) -> Units:
    """The units of a network that is still on the meta device, where a forward pass costs nothing."""
    meta = torch.device("meta")
    condition = {key: torch.empty(tensor.shape, device=meta) for key, tensor in conditions.rows([0]).items()}
    if guidance == "embedded":
        condition["guidance"] = torch.empty(1, device=meta)
    x, t = torch.empty(1, *shape, device=meta), torch.empty(1, device=meta)
    try:
        return find_units(network, lambda: predict(x, t, condition))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: the network does not run on latents of {list(shape)} and what the text encoders give "
            f"({first_line(error)}); take all parts from one pipeline"
        ) from error


def _reduce(network: nn.Module, precision: str) -> None:
    """``store_reduced``, and the same for RMSNorm, which is fast only where its input and weight are of one type."""
    store_reduced(network, precision)
    for module in network.modules():
        if isinstance(module, nn.RMSNorm) and module.weight is not None:
            module.weight.data = module.weight.data.to(PRECISIONS[precision])


def _read_single_file(
    file: Path, network: nn.Module, pipeline: _Pipeline, folder: Path, dtype: torch.dtype
) -> tuple[Weights, Notes]:
    """Weights of ``network`` from one file in its authors' layout; ``folder``: the pipeline with its config."""
    weights, notes = read_single_file(file, pipeline.network, folder, pipeline.folder, dtype)
    check_fit(network, weights, file, "config.json")
    return weights, notes
