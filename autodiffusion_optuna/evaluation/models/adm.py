"""Checkpoints of guided-diffusion (ADM, arXiv 2105.05233) as diffusers' UNet2DModel, and their classifier guidance.

A checkpoint is a bare state dict; its architecture comes from ``AdmFields``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.denoiser import Condition, Denoiser, store_reduced
from autodiffusion_optuna.evaluation.models.adm_classifier import EncoderUNetModel, label_gradient
from autodiffusion_optuna.evaluation.models.adm_fields import (
    CHANNELS,
    GROUPS,
    AdmFields,
    check_fields,
    noise_schedule,
    resolve_fields,
)
from autodiffusion_optuna.evaluation.models.base import (
    Model,
    assemble,
    check_unused,
    choose_clip,
    count_parameters,
    label_conditions,
    trace_units,
)
from autodiffusion_optuna.evaluation.models.checkpoints import read_weights
from autodiffusion_optuna.evaluation.models.parts import digest
from autodiffusion_optuna.evaluation.tensors import check_numbers, misfit, plain_weights

Built = TypeVar("Built", bound=nn.Module)


def load_adm(config: ModelConfig, device: torch.device, path: Path) -> Model:
    """The ADM in the checkpoint ``path`` (.pt or .safetensors), guided by ``model.classifier`` where that is given.

    ``model.preset`` and ``model.fields`` give the architecture; fields come before the preset's. A model of
    classes takes the condition ``{"label": int64 [B]}``; one without class conditioning takes it for the classifier
    alone. Below float32, norms, softmax and time embedding stay float32, as in guided-diffusion, and so does the
    classifier. ``ModelError`` where a file is missing, damaged, holds code or does not fit; ``ConfigError`` where the
    settings contradict each other.
    """
    adm = resolve_fields(config.preset, config.fields)
    _check_settings(adm, config, path.stem)
    notes = _assumed(adm, config)
    network = _load(path, lambda weights: convert(weights, adm), notes).to(device)
    files, classifier = [path], None
    if config.classifier is not None:
        files.append(Path(config.classifier))
        classifier = _load(files[1], lambda weights: convert_classifier(weights, adm), notes).to(device)

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        label = condition["label"] if adm.class_cond else None
        prediction: Tensor = network(x, model_times, class_labels=label, return_dict=False)[0]
        return prediction

    # On the smallest images that the network takes: the order is the same and the pass costs nothing.
    side = 2 ** len(adm.multipliers)  # two at the last level: norms refuse a single value
    some = {"label": torch.zeros(1, dtype=torch.int64, device=device)}
    units = trace_units(network, lambda x, t: predict(x, t, some), (CHANNELS, side, side), device, "float32", path)
    if config.precision != "float32":
        _keep_float32(network, device)
        _store_reduced(network, config.precision)
    denoiser = Denoiser(
        predict,
        noise_schedule(adm),
        "sample" if adm.predict_xstart else "epsilon",
        device,
        config.precision,
        choose_clip(config.clip, path.stem, latent=False),
        units,
        "classifier" if classifier else "none",
        label_gradient(classifier) if classifier else None,
    )
    labelled = adm.class_cond or classifier is not None
    unused = ("own_weights",) if classifier else ("own_weights", "classifier_")
    decisive = {name: value for name, value in asdict(adm).items() if not name.startswith(unused)}
    return assemble(
        config,
        denoiser,
        name=path.stem,
        fingerprint=digest(files, decisive),
        shape=(CHANNELS, adm.image_size, adm.image_size),
        conditions=label_conditions(range(adm.num_classes), device, draw=config.labels) if labelled else None,
        kind="adm",
        parameters=count_parameters(network),
        notes=tuple(notes),
    )


def _check_settings(adm: AdmFields, config: ModelConfig, name: str) -> None:
    check_unused(config, name, ("preset", "fields", "classifier", "size"))
    if config.classifier is not None and not adm.num_classes:
        raise ConfigError(
            f"classifier {config.classifier} was given, but the model is of data without classes (num_classes 0); "
            "leave classifier out"
        )
    if config.size is not None and config.size != [adm.image_size, adm.image_size]:
        raise ConfigError(f"size {config.size} was given, but this ADM makes {adm.image_size} pixels a side")


def _assumed(adm: AdmFields, config: ModelConfig) -> list[str]:
    """A line where guided-diffusion's defaults stand in for fields that no weight shows."""
    fields = [name for name in UNSEEN if config.preset is None and name not in config.fields]
    if adm.num_head_channels != -1:  # which says how many heads there are
        fields = [name for name in fields if not name.startswith("num_head")]
    if not fields:
        return []
    listed = ", ".join(f"{name} = {json.dumps(getattr(adm, name))}" for name in fields)
    return [f"model.fields does not say all that no weight shows; assumed is guided-diffusion's default: {listed}"]


UNSEEN = (
    "use_new_attention_order",
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
    "predict_xstart",
)
"""Fields that decide samples and leave no trace in the weights."""


def _load(path: Path, build: Callable[[Mapping[str, Tensor]], Built], notes: list[str]) -> Built:
    """The network that ``build`` makes of the checkpoint; its errors name the file."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give a checkpoint as guided-diffusion saves it, or as safetensors")
    weights = plain_weights(read_weights([path], notes), path)
    try:
        return build(weights)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def convert(state_dict: Mapping[str, Tensor], fields: AdmFields) -> nn.Module:
    """The UNet2DModel, float32 and frozen on the CPU, that computes what an ADM with these weights does.

    ``state_dict``: under guided-diffusion's names. ``ModelError`` where it does not fit ``fields``, ``ConfigError``
    where those cannot be. Fixed head counts (``num_heads``) live in the modules alone: diffusers' config cannot hold
    them, so a saved copy would not have them.
    """
    check_fields(fields)
    with torch.device("meta"):
        network = build_unet(fields)
    wanted = network.state_dict()
    layers = list(_adm_keys(fields, wanted))
    _check_fit(state_dict, {source: shape for source, _, shape in layers})
    weights = {}
    for source, targets, _ in layers:
        value = state_dict[source].float()
        pieces = _split_qkv(value, targets[0], fields) if len(targets) == 3 else [value]
        for target, piece in zip(targets, pieces, strict=True):
            weights[target] = piece.reshape(wanted[target].shape).clone()
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def convert_classifier(state_dict: Mapping[str, Tensor], fields: AdmFields) -> EncoderUNetModel:
    """The classifier of ``fields`` with these weights, float32 and frozen on the CPU. ``ModelError`` for others."""
    with torch.device("meta"):
        classifier = EncoderUNetModel(fields)
    _check_fit(state_dict, {key: tuple(value.shape) for key, value in classifier.state_dict().items()})
    classifier.load_state_dict({key: value.float().clone() for key, value in state_dict.items()}, assign=True)
    return classifier.eval().requires_grad_(False)


def build_unet(adm: AdmFields) -> nn.Module:
    """The UNet2DModel of an ADM, its weights not yet those of any."""
    from diffusers import UNet2DModel

    plain = "Resnet{}sampleBlock2D" if adm.resblock_updown else "{}Block2D"
    levels = range(len(adm.multipliers))
    kinds = ["Attn{}Block2D" if level in adm.attention_levels else plain for level in levels]
    resample = "resnet" if adm.resblock_updown else "conv"
    network: nn.Module = UNet2DModel(
        sample_size=adm.image_size,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS if adm.learn_sigma else CHANNELS,
        block_out_channels=tuple(multiplier * adm.num_channels for multiplier in adm.multipliers),
        layers_per_block=adm.num_res_blocks,
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        downsample_type=resample,
        upsample_type=resample,
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if adm.use_scale_shift_norm else "default",
        attention_head_dim=adm.num_channels if adm.num_head_channels == -1 else adm.num_head_channels,
        num_class_embeds=adm.num_classes if adm.class_cond else None,
        flip_sin_to_cos=True,
        freq_shift=0,
    )
    for path, module in network.named_modules():
        if type(module).__name__ == "Attention":
            attention: Any = module
            attention.heads = _heads_at(path, adm)
            attention.scale = (attention.inner_dim // attention.heads) ** -0.5
    return network


def _heads_at(path: str, adm: AdmFields) -> int:
    """Heads of the attention at a path in the UNet2DModel, whose up blocks count from the last level."""
    block, place = path.split(".")[:2]
    if block == "up_blocks":
        return adm.head_counts[len(adm.multipliers) - 1 - int(place)][1]
    return adm.head_counts[int(place) if block == "down_blocks" else -1][0]


RESIDUAL = {
    "in_layers.0": ("norm1",),
    "in_layers.2": ("conv1",),
    "emb_layers.1": ("time_emb_proj",),
    "out_layers.0": ("norm2",),
    "out_layers.3": ("conv2",),
    "skip_connection": ("conv_shortcut",),
}
ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj_out": ("to_out.0",)}
DOWN, UP = {"op": ("conv",)}, {"conv": ("conv",)}
"""Layers of a block by ADM's names -> diffusers'."""

Layers = Mapping[str, tuple[str, ...]]


def adm_blocks(adm: AdmFields) -> Iterator[tuple[str, str, Layers]]:
    """(ADM's path, UNet2DModel's path, layers) of every block in execution order."""
    levels, depth = range(len(adm.multipliers)), adm.num_res_blocks
    down, up = (RESIDUAL, RESIDUAL) if adm.resblock_updown else (DOWN, UP)
    block = 1
    for level in levels:
        for i in range(depth):
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}", RESIDUAL
            if level in adm.attention_levels:
                yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}", ATTENTION
            block += 1
        if level < levels[-1]:
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0", down
            block += 1
    yield "middle_block.0", "mid_block.resnets.0", RESIDUAL
    yield "middle_block.1", "mid_block.attentions.0", ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", RESIDUAL
    block = 0
    for place, level in enumerate(reversed(levels)):
        attends = level in adm.attention_levels
        for i in range(depth + 1):
            yield f"output_blocks.{block}.0", f"up_blocks.{place}.resnets.{i}", RESIDUAL
            if attends:
                yield f"output_blocks.{block}.1", f"up_blocks.{place}.attentions.{i}", ATTENTION
            if level > 0 and i == depth:
                yield f"output_blocks.{block}.{1 + attends}", f"up_blocks.{place}.upsamplers.0", up
            block += 1


def adm_layers(adm: AdmFields) -> Iterator[tuple[str, tuple[str, ...]]]:
    """ADM's path of every layer with weights, and the UNet2DModel's paths that hold them."""
    yield "time_embed.0", ("time_embedding.linear_1",)
    yield "time_embed.2", ("time_embedding.linear_2",)
    yield "label_emb", ("class_embedding",)
    yield "input_blocks.0.0", ("conv_in",)
    for source, target, layers in adm_blocks(adm):
        for name, parts in layers.items():
            yield f"{source}.{name}", tuple(f"{target}.{part}" for part in parts)
    yield "out.0", ("conv_norm_out",)
    yield "out.2", ("conv_out",)


def _adm_keys(adm: AdmFields, wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """(ADM's key, the UNet2DModel's keys, shape) of each weight; ``wanted``: state of the UNet2DModel."""
    for source, targets in adm_layers(adm):
        projection = source.endswith((".qkv", ".proj_out"))  # a convolution over positions there
        for part in ("weight", "bias"):
            keys = [f"{target}.{part}" for target in targets]
            if keys[0] in wanted:
                first, *rest = wanted[keys[0]].shape
                rest += [1] if part == "weight" and projection else []
                yield f"{source}.{part}", keys, (first * len(keys), *rest)


def _split_qkv(value: Tensor, path: str, adm: AdmFields) -> Sequence[Tensor]:
    """q, k and v of the joint projection [3 C, ...] for the attention at ``path``: thirds, or head by head."""
    if adm.use_new_attention_order:
        return value.chunk(3)
    return value.reshape(_heads_at(path, adm), 3, -1, *value.shape[1:]).unbind(1)


def _check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """``ModelError`` that names the first weight that does not fit."""
    if "input_blocks.0.0.weight" not in given:
        first = f"first key {next(iter(given))!r}" if given else "it is empty"
        raise ModelError(f"is no ADM checkpoint: it has no input_blocks.0.0.weight ({first}); give one")
    check_numbers(given, wanted, "weights do not fit")
    if problem := misfit(given, wanted):
        raise ModelError(
            f"weights do not fit the preset or fields, {problem}; give the preset or the fields it was trained with"
        )


def _exact(name: str, module: nn.Module) -> bool:
    """Whether guided-diffusion keeps a module in float32 when the network runs in half precision."""
    return isinstance(module, nn.GroupNorm) or name in ("time_embedding", "conv_out") or name.endswith("time_emb_proj")


def _keep_float32(network: nn.Module, device: torch.device) -> None:
    """Take norms, time embedding and the last convolution out of autocast. (Its attention sums in float32 anyway.)"""

    def in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
        def exact(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device.type, enabled=False):
                return forward(x.float(), *args, **kwargs)

        return exact

    for name, module in network.named_modules():
        if _exact(name, module):
            module.forward = in_float32(module.forward)


def _store_reduced(network: nn.Module, precision: str) -> None:
    """``store_reduced`` for all but what is exact, and the first convolution, which tells diffusers the dtype."""
    for name, module in network.named_modules():
        inside = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
        if inside and isinstance(module, (nn.Linear, nn.Conv2d)) and not _exact(name, module):
            store_reduced(module, precision)
