"""Models of what is in memory already: a diffusers pipeline, or a network and its scheduler. Nothing is written."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autodiffusion_optuna.config import MEMORY, ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.denoiser import PRECISIONS, Condition, Denoiser, weights_sample
from autodiffusion_optuna.evaluation.models import text
from autodiffusion_optuna.evaluation.models.base import Model, assemble, check_unused, choose_clip, trace_units
from autodiffusion_optuna.evaluation.models.diffusers_folder import (
    DECODERS,
    DIT,
    NAMES,
    UNET,
    Described,
    class_conditions,
    make_model,
    state_shape,
)
from autodiffusion_optuna.evaluation.models.scheduler import Scheduler, read_scheduler
from autodiffusion_optuna.evaluation.models.text_to_image import (
    PIPELINES,
    Texts,
    find_guidance,
    find_schedule,
    latent_shape,
    text_conditions,
)
from autodiffusion_optuna.evaluation.models.vae import AUTOENCODERS, Vae, make_vae
from autodiffusion_optuna.evaluation.units import release

ITS_OWN = {"device": "auto", "precision": "float32", "compile": False, "config": None, "preset": None}
"""Settings that say how a model is loaded, and their defaults: an object has them already."""

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Parts:
    """What was given, by its parts. ``kind``: class of the pipeline, or of the bare network."""

    kind: str
    network: Any
    scheduler: Any
    others: Mapping[str, Any]

    @property
    def modules(self) -> list[nn.Module]:
        """The network, the decoder and the text encoders."""
        found = [self.network, *self.others.values()]
        return [module for module in found if isinstance(module, nn.Module)]

    @property
    def settings(self) -> dict[str, Any]:
        """Of ``[model]``: what the object itself says."""
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == self.network.dtype)
        return {"source": MEMORY + self.kind, "device": str(self.network.device), "precision": precision}


def parts_of(given: object, scheduler: object = None) -> Parts:
    """Network, scheduler and the rest of a diffusers pipeline, or of a network with its scheduler.

    ``ConfigError`` where one is missing or is there twice, ``ModelError`` for a network that cannot be run as it lies.
    """
    kind, others = type(given).__name__, dict(getattr(given, "components", {}))
    if others:
        if scheduler is not None:
            raise ConfigError(f"a scheduler was given beside a {kind}, which has its own; set pipe.scheduler instead")
        known = [base.__name__ for base in type(given).__mro__]
        kind = next((name for name in known if name in PIPELINES or name == "DiTPipeline"), kind)
        network = next((others.pop(name) for name in ("unet", "transformer") if others.get(name) is not None), None)
        scheduler = others.pop("scheduler", None)
    else:
        network = given
    network = getattr(network, "_orig_mod", network)  # inside torch.compile
    if not isinstance(network, nn.Module) or not hasattr(network, "config"):
        raise ConfigError(
            f"the model is a {kind}; give a diffusers pipeline, a UNet2DModel with scheduler=, or the name, folder or "
            "hub id of a model"
        )
    if not hasattr(scheduler, "config"):
        raise ConfigError(
            f"a {kind} says nothing of the noise it was trained on; give scheduler= too, such as DDPMScheduler()"
        )
    parts = Parts(kind, network, scheduler, others)
    if any(weight.is_meta for weight in network.parameters()) or hasattr(network, "_hf_hook"):
        raise ModelError(f"{kind}: its weights are offloaded; give it without offloading, on a device that holds it")
    if network.dtype not in PRECISIONS.values():
        raise ModelError(f"{kind}: its weights are {network.dtype}; convert it to one of {', '.join(PRECISIONS)}")
    return parts


@contextlib.contextmanager
def model_in_memory(parts: Parts, config: ModelConfig, prompts: Sequence[str] | None = None) -> Iterator[Model]:
    """The model of ``parts`` inside the block, run where they lie, in their own dtype, with the same weights.

    Its layers are as they were afterwards, and in training mode where they were. ``config``: ``model`` of a study whose
    ``device`` and ``precision`` are those of ``parts.settings``. ``prompts``: of a text-to-image pipeline.
    ``ConfigError`` for a setting that does not suit the model, ``ModelError`` for a kind that is not supported.
    """
    training = [(module, module.training) for part in parts.modules for module in part.modules()]
    for part in parts.modules:
        part.eval()
    try:
        yield _model(parts, config, prompts)
    finally:
        release(parts.network)
        for module, before in training:
            module.training = before


def check_its_own(settings: Mapping[str, Any]) -> None:
    """``ConfigError`` for a setting of ``[model]`` that an object in memory has itself."""
    for name, default in ITS_OWN.items():
        if settings.get(name, default) != default:
            raise ConfigError(
                f"{name} = {settings[name]!r} was given for a model in memory, which is run as it is; change the model "
                "itself, such as with .to(device, dtype)"
            )


def _model(parts: Parts, config: ModelConfig, prompts: Sequence[str] | None) -> Model:
    if parts.kind in PIPELINES:
        return _text_to_image(parts, config, prompts)
    if prompts is not None:
        raise ConfigError(f"prompts were given, but a {parts.kind} takes none; leave prompts out")
    names = [base.__name__ for base in type(parts.network).__mro__]
    kind = DIT if parts.kind == "DiTPipeline" else UNET
    if not set(NAMES[kind]) & set(names):
        raise ModelError(
            f"{parts.kind} has a {names[0]}; supported are {', '.join(PIPELINES)}, DiTPipeline, pipelines of a {UNET}, "
            f"and a {UNET} with its scheduler"
        )
    device, where, facts = parts.network.device, parts.kind, dict(parts.network.config)
    vae = _vae(next((parts.others[name] for name in DECODERS if parts.others.get(name) is not None), None), where)
    clip = choose_clip(config.clip, where, latent=vae is not None)
    scheduler = _scheduler(parts)
    known = Described(
        where,
        state_shape(facts, kind, where),
        clip,
        class_conditions(facts, kind, config, where, where, device),
        scheduler,
        vae,
    )
    plain = config.model_copy(update={"precision": "float32"})  # no autocast: the network runs in its own dtype
    digest = _digest([parts.network], scheduler.config, {"vae": vae and vae.digest})
    return make_model(plain, parts.network, known, device=device, name=where, fingerprint=digest, kind=where, notes=())


def _text_to_image(parts: Parts, config: ModelConfig, prompts: Sequence[str] | None) -> Model:
    if not prompts:
        raise ConfigError(f"a {parts.kind} draws images of prompts; give prompts= as a list of texts, or a file")
    kind, where, network = PIPELINES[parts.kind], parts.kind, parts.network
    clip = choose_clip(config.clip, where, latent=True)
    guidance = find_guidance(network, kind, where)
    check_unused(config, where, {"prompts", "size", *(["negative_prompt"] if guidance == "free" else [])})
    vae = _vae(parts.others.get("vae"), where)
    if vae is None:
        raise ModelError(f"{where}: has no vae, so no images can be compared; give the whole pipeline")
    shape = latent_shape(network, kind, vae, config.size, where)
    image_shape = vae.image_shape(shape, where)
    scheduler = _scheduler(parts)
    encoders = _encoders(parts, kind.t5_length)
    zeros = kind.encode is text.encode_sdxl and parts.others.get("force_zeros_for_empty_prompt", True)
    texts = Texts(lambda _: encoders, partial(_encoders_digest, encoders), zeros)
    device, dtype = network.device, network.dtype
    conditions = text_conditions(config, kind, texts, prompts, network.config, dtype, device, guidance, image_shape)

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        return kind.predict(network, x.to(dtype), model_times, condition)

    some = dict(conditions.rows([0]))
    some |= {"guidance": torch.ones(1, device=device)} if guidance == "embedded" else {}
    units = trace_units(network, lambda x, t: predict(x, t, some), shape, device, "float32", where)
    schedule = find_schedule(scheduler, shape, kind, where)
    denoiser = Denoiser(predict, schedule, scheduler.prediction, device, "float32", clip, units, guidance)
    return assemble(
        config,
        denoiser,
        vae,
        name=where,
        fingerprint=_digest([network], scheduler.config, {"pipeline": where, "vae": vae.digest}),
        shape=shape,
        weights=weights_sample(network),
        conditions=conditions,
        scale=1.0 if guidance == "none" else kind.scale,
        image_shape=image_shape,
        kind=where,
        notes=scheduler.notes,
    )


def _scheduler(parts: Parts) -> Scheduler:
    said = {key: value for key, value in parts.scheduler.config.items() if not key.startswith("_")}
    return read_scheduler({**said, "_class_name": type(parts.scheduler).__name__}, f"scheduler of the {parts.kind}")


def _vae(network: Any, where: str) -> Vae | None:
    if network is None:
        return None
    if type(network).__name__ not in AUTOENCODERS:
        raise ModelError(f"{where}: decodes with a {type(network).__name__}; supported are {', '.join(AUTOENCODERS)}")
    digest = _digest([network])
    if network.dtype == torch.float16 and network.config.get("force_upcast"):
        network = copy.deepcopy(network).float()  # which overflows else; pipelines convert it back and forth

    def encode(image: Tensor) -> Tensor:
        encoded = network.encoder(image.to(network.dtype))
        latent: Tensor = encoded if network.quant_conv is None else network.quant_conv(encoded)
        return latent

    return make_vae(network, encode, digest, f"vae of the {where}")


def _encoders(parts: Parts, t5_length: int) -> dict[str, text.TextEncoder]:
    found = {}
    for name in text.NAMES:
        model, tokenizer = parts.others.get(name), parts.others.get(name.replace("text_encoder", "tokenizer"))
        if model is not None and tokenizer is not None:
            found[name] = text.TextEncoder(tokenizer, model, text.token_length(tokenizer, model, t5_length))
    return found


def _encoders_digest(encoders: text.Encoders) -> str:
    vocabularies = {name: sorted(encoder.tokenizer.get_vocab().items()) for name, encoder in encoders.items()}
    lengths = {name: encoder.length for name, encoder in encoders.items()}
    return _digest([encoder.model for encoder in encoders.values()], vocabularies, lengths)


def _digest(modules: Sequence[nn.Module], *facts: Mapping[str, Any]) -> str:
    """sha256 in hexadecimal over the configs and weights of modules, and ``facts``."""
    whole = hashlib.sha256()
    configs: list[Any] = [module.config for module in modules]
    described = [config.to_dict() if hasattr(config, "to_dict") else config for config in configs]
    for table in (*described, *facts):
        kept = {key: value for key, value in table.items() if not key.startswith("_")}
        whole.update(json.dumps(kept, sort_keys=True, default=_plain).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no form for: arrays of betas, and dtypes."""
    return value.tolist() if isinstance(value, (np.ndarray, Tensor)) else str(value)
