"""Checkpoints of guided-diffusion (ADM, arXiv 2105.05233) as diffusers' UNet2DModel, and their classifier guidance.

A checkpoint is a bare state dict. Its architecture comes from ``AdmFields``, part of which leaves no trace in the
weights: the order of q, k and v, the number of attention heads, the noise schedule and how times are scaled. A wrong
one of these loads and samples badly. ``check_fields`` refuses what contradicts a published model of exactly the same
architecture; for any other architecture nothing can be seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.denoiser import Condition, Denoiser, Gradient, GuidanceKind, store_reduced
from autodiffusion_optuna.evaluation.models.adm_classifier import EncoderUNetModel, label_gradient
from autodiffusion_optuna.evaluation.models.base import Conditions, Model, Options, find_device
from autodiffusion_optuna.evaluation.models.parts import digest, read_weights
from autodiffusion_optuna.evaluation.seeds import Draw
from autodiffusion_optuna.evaluation.skip import Units, compile_units, find_units
from autodiffusion_optuna.evaluation.tensors import check_numbers, weights_of
from autodiffusion_optuna.noise import NoiseSchedule, cosine, linear

CHANNELS = 3
GROUPS = 32  # of every norm

MULTIPLIERS = {64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4", 512: "0.5,1,1,2,2,4,4"}
"""Image size -> what an empty ``channel_mult`` means."""

SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": lambda steps: linear(steps, 0.1 / steps, 20 / steps),  # 1e-4 to 0.02 at 1000 steps, scaled for others
    "cosine": cosine,
}

FIRST_WIDTH = "a first width that is not num_channels (0.5 times it at 512 pixels) cannot be held by UNet2DModel"

IGNORED = frozenset(
    {"dropout", "use_checkpoint", "use_fp16", "classifier_use_fp16", "use_kl", "rescale_learned_sigmas"}
)
"""Flags of guided-diffusion that are for training, or that ``precision`` replaces; accepted without effect."""


@dataclass(frozen=True)
class AdmFields:
    """Architecture and noise of an ADM and its classifier, by guided-diffusion's names and with its defaults.

    ``channel_mult``: integers, or empty for those of the image size. ``attention_resolutions``: sides in pixels.
    ``num_head_channels``: -1 for ``num_heads`` heads at every level (``num_heads_upsample`` in the decoder, unless -1).

    These are constants there: ``num_classes``, 0 where the data has none; ``classifier_num_head_channels``;
    ``classifier_channel_mult``. ``own_weights``: not OpenAI's weights, so nothing is known of them.
    """

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: str = ""
    learn_sigma: bool = False
    class_cond: bool = False
    attention_resolutions: str = "16,8"
    num_heads: int = 4
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    num_classes: int = 1000
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    rescale_timesteps: bool = False
    predict_xstart: bool = False
    classifier_width: int = 128
    classifier_depth: int = 2
    classifier_attention_resolutions: str = "32,16,8"
    classifier_use_scale_shift_norm: bool = True
    classifier_resblock_updown: bool = True
    classifier_pool: str = "attention"
    classifier_num_head_channels: int = 64
    classifier_channel_mult: str = ""
    own_weights: bool = False

    @property
    def multipliers(self) -> tuple[int, ...]:
        """Width of each level in units of ``num_channels``."""
        return _multipliers("channel_mult", self.channel_mult, self.image_size)

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """Levels that have attention, 0 being the full size; the middle block always has it."""
        factors = _factors("attention_resolutions", self.attention_resolutions, self.image_size)
        return tuple(level for level in range(len(self.multipliers)) if 2**level in factors)

    @property
    def head_counts(self) -> tuple[tuple[int, int], ...]:
        """Attention heads (encoder, decoder) of each level; the middle block has the encoder's of the last level."""
        up = self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample
        if self.num_head_channels == -1:
            return ((self.num_heads, up),) * len(self.multipliers)
        return tuple((m * self.num_channels // self.num_head_channels,) * 2 for m in self.multipliers)


_IMAGENET = AdmFields(
    num_channels=256,
    attention_resolutions="32,16,8",
    class_cond=True,
    learn_sigma=True,
    num_head_channels=64,
    resblock_updown=True,
)

PRESETS: dict[str, AdmFields] = {
    "imagenet64": replace(
        _IMAGENET,
        image_size=64,
        num_channels=192,
        num_res_blocks=3,
        use_new_attention_order=True,
        noise_schedule="cosine",
        classifier_depth=4,
    ),
    "imagenet128": replace(_IMAGENET, image_size=128, num_head_channels=-1, num_heads=4),
    "imagenet256": replace(_IMAGENET, image_size=256),
    "imagenet256_uncond": replace(_IMAGENET, image_size=256, class_cond=False),
    "lsun256": replace(_IMAGENET, image_size=256, class_cond=False, num_classes=0),
}
"""Models that OpenAI published, as the flags in guided-diffusion's README define them."""


def load_adm(path: Path, device: str, precision: str, clip: bool, options: Options) -> Model:
    """The ADM in the checkpoint ``path`` (.pt or .safetensors), guided by ``options.classifier`` where that is given.

    ``options.preset`` and ``options.fields`` give the architecture; fields come before the preset's. A model of
    classes takes the condition ``{"label": int64 [B]}``; one without class conditioning takes it for the classifier
    alone. Below float32, norms, softmax and time embedding stay float32, as in guided-diffusion, and so does the
    classifier. ``ModelError`` where a file is missing, damaged, holds code or does not fit; ``ConfigError`` where the
    options contradict each other.
    """
    place = find_device(device)
    adm = resolve_fields(options.preset, options.fields)
    _check_options(adm, options)
    notes = _assumed(adm, options)
    network = _load(path, partial(convert, fields=adm), notes).to(place)
    guide = partial(convert_classifier, fields=adm)
    classifier = _load(options.classifier, guide, notes) if options.classifier else None
    units = _units(network, adm, place)
    gradient = label_gradient(classifier.to(place)) if classifier else None
    denoiser = _denoiser(network, adm, place, precision, clip, units, gradient)
    if precision != "float32":
        _keep_float32(network, place)
        if options.reduced:
            _store_reduced(network, precision)
    if options.compile:
        compile_units(units)
    files = [path, options.classifier] if options.classifier else [path]
    labelled = adm.class_cond or gradient is not None
    return Model(
        name=path.stem,
        fingerprint=digest(files, _measured(adm, options)),
        shape=(CHANNELS, adm.image_size, adm.image_size),
        schedule=denoiser.schedule,
        denoiser=denoiser,
        device=place,
        units=units.names,
        conditions=_labels(adm.num_classes, place, options.labels) if labelled else None,
        guidance=denoiser.guidance,
        scale=1.0 if options.guidance is None else options.guidance,
        kind="adm",
        notes=tuple(notes),
    )


def resolve_fields(preset: str | None, given: Mapping[str, Any]) -> AdmFields:
    """``given`` in place of the preset's fields, or of guided-diffusion's defaults where there is no preset.

    ``ConfigError`` where neither is given, a name or a value is wrong, or ``check_fields`` refuses them.
    """
    if preset is None and not given:
        raise ConfigError(
            "an ADM checkpoint does not say its architecture; set model.preset "
            f"({', '.join(PRESETS)}) or model.fields (guided-diffusion's flags)"
        )
    if preset == "imagenet512":
        raise ConfigError(f"preset 'imagenet512' cannot be used: {FIRST_WIDTH}; take one of: {', '.join(PRESETS)}")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(choose_from("ADM preset", preset, PRESETS))
    types: dict[str, type] = {name: type(value) for name, value in asdict(AdmFields()).items()}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in IGNORED:
            continue
        if name not in types:
            raise ConfigError(choose_from("ADM field", name, types))
        if types[name] is str and type(value) is int:  # "8" of a command line
            value = str(value)
        if type(value) is not types[name]:
            raise ConfigError(f"ADM field {name} is {value!r}, but must be of type {types[name].__name__}")
        values[name] = value
    resolved = replace(PRESETS[preset] if preset else AdmFields(), **values)
    check_fields(resolved)
    return resolved


def check_fields(adm: AdmFields) -> None:
    """``ConfigError`` where no network can have these fields, or they contradict a published one's."""
    for name in ("image_size", "num_channels", "num_res_blocks", "diffusion_steps", "classifier_depth"):
        if getattr(adm, name) < 1:
            raise ConfigError(f"ADM field {name} is {getattr(adm, name)}, but must be at least 1")
    for name, unused in (("num_heads", 0), ("num_head_channels", -1), ("num_heads_upsample", -1), ("num_classes", 0)):
        if getattr(adm, name) < 1 and getattr(adm, name) != unused:
            raise ConfigError(f"ADM field {name} is {getattr(adm, name)}, but must be at least 1, or {unused} for none")
    if adm.noise_schedule not in SCHEDULES:
        raise ConfigError(choose_from("ADM field noise_schedule", adm.noise_schedule, SCHEDULES))
    if adm.class_cond and not adm.num_classes:
        raise ConfigError("ADM field class_cond is true, but num_classes is 0; say how many classes there are")
    if adm.num_channels % GROUPS:
        raise ConfigError(f"ADM field num_channels is {adm.num_channels}, but must be a multiple of {GROUPS}")
    if adm.multipliers[0] != 1:
        raise ConfigError(f"ADM field channel_mult is {adm.channel_mult!r}: {FIRST_WIDTH}")
    if adm.image_size % 2 ** (len(adm.multipliers) - 1):
        raise ConfigError(f"ADM field image_size {adm.image_size} cannot be halved {len(adm.multipliers) - 1} times")
    for level in {*adm.attention_levels, len(adm.multipliers) - 1}:
        width = adm.multipliers[level] * adm.num_channels
        for heads in adm.head_counts[level]:
            if heads < 1 or width % heads or (adm.num_head_channels > 0 and width % adm.num_head_channels):
                raise ConfigError(
                    f"ADM fields: {width} channels cannot be split among attention heads by num_heads={adm.num_heads}, "
                    f"num_head_channels={adm.num_head_channels}; give those the checkpoint was trained with"
                )
    if not adm.own_weights:
        _check_against_published(adm)


def _check_against_published(adm: AdmFields) -> None:
    """Refuse what cannot be seen in weights where a published model of the same architecture is known to differ."""
    twins = {name: preset for name, preset in PRESETS.items() if _visible(preset) == _visible(adm)}
    if not twins or any(_invisible(twin) == _invisible(adm) for twin in twins.values()):
        return
    name, twin = next(iter(twins.items()))
    what = next(key for key, value in _invisible(adm).items() if value != _invisible(twin)[key])
    raise ConfigError(
        f"ADM fields give {what} {_invisible(adm)[what]}, but preset {name!r}, of exactly this architecture, has "
        f"{_invisible(twin)[what]}, and the wrong one would load unnoticed; set model.preset = {name!r} alone, or, "
        "for weights that are not OpenAI's, model.fields.own_weights = true"
    )


def _visible(adm: AdmFields) -> tuple[object, ...]:
    """What names and shapes of the weights tell, and the image size."""
    return (
        adm.image_size,
        adm.num_channels,
        adm.num_res_blocks,
        adm.multipliers,
        adm.attention_levels,
        adm.learn_sigma,
        adm.num_classes if adm.class_cond else 0,
        adm.use_scale_shift_norm,
        adm.resblock_updown,
    )


def _invisible(adm: AdmFields) -> dict[str, object]:
    """What they do not tell."""
    levels = sorted({*adm.attention_levels, len(adm.multipliers) - 1})
    return {
        "use_new_attention_order": adm.use_new_attention_order,
        "attention heads (encoder, decoder) by level": [adm.head_counts[level] for level in levels],
        "noise_schedule": adm.noise_schedule,
    }


def _multipliers(name: str, text: str, image_size: int) -> tuple[int, ...]:
    if not text and image_size not in MULTIPLIERS:
        sizes = ", ".join(str(size) for size in MULTIPLIERS)
        raise ConfigError(f"ADM field {name} is empty, which is for image_size {sizes}, not {image_size}; give it")
    text = text or MULTIPLIERS[image_size]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"ADM field {name} is {text!r}; give integers with commas between, as '1,2,3,4'") from None
    if numbers[0] == 0.5:
        raise ConfigError(f"ADM field {name} is {text!r} (image_size {image_size}): {FIRST_WIDTH}")
    if any(number < 1 or number % 1 != 0 for number in numbers):
        raise ConfigError(f"ADM field {name} is {text!r}; give integers with commas between, as '1,2,3,4'")
    return tuple(int(number) for number in numbers)


def _factors(name: str, text: str, image_size: int) -> tuple[int, ...]:
    """Downsampling factors of sides in pixels, as guided-diffusion rounds them."""
    try:
        return tuple(image_size // int(side) for side in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"ADM field {name} is {text!r}; give sides in pixels with commas between") from None


def _check_options(adm: AdmFields, options: Options) -> None:
    if options.classifier is not None and not adm.num_classes:
        raise ConfigError(
            f"classifier {options.classifier} was given, but the model is of data without classes (num_classes 0); "
            "leave classifier out"
        )
    if options.guidance is not None and options.classifier is None:
        raise ConfigError(
            f"guidance {options.guidance:g} was given, but an ADM is guided by a classifier and none is set; "
            "set model.classifier to its checkpoint or leave guidance out"
        )
    if options.size is not None and tuple(options.size) != (adm.image_size, adm.image_size):
        raise ConfigError(f"size {list(options.size)} was given, but this ADM makes {adm.image_size} pixels a side")
    for name in ("prompts", "negative_prompt", "config"):
        if getattr(options, name):
            raise ConfigError(f"{name} was given, but an ADM takes class labels alone; leave {name} out")


Built = TypeVar("Built", bound=nn.Module)


def _assumed(adm: AdmFields, options: Options) -> list[str]:
    """A line where guided-diffusion's defaults stand in for fields that no weight shows."""
    fields = [name for name in UNSEEN if options.preset is None and name not in options.fields]
    if adm.num_head_channels != -1:  # which says how many heads there are
        fields = [name for name in fields if not name.startswith("num_head")]
    if not fields:
        return []
    told = ", ".join(f"{name} = {json.dumps(getattr(adm, name))}" for name in fields)
    return [f"model.fields does not say all that no weight shows; assumed is guided-diffusion's default: {told}"]


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
    weights = weights_of(read_weights([path], notes), path)
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
    names = dict(_modules(fields))
    _check_fit(state_dict, dict(_shapes(names, wanted)))
    weights = {}
    for source, targets in names.items():
        for part in ("weight", "bias"):
            if f"{targets[0]}.{part}" not in wanted:
                continue
            value = state_dict[f"{source}.{part}"].float()
            pieces = _split_qkv(value, targets[0], fields) if len(targets) == 3 else [value]
            for target, piece in zip(targets, pieces, strict=True):
                weights[f"{target}.{part}"] = piece.reshape(wanted[f"{target}.{part}"].shape).clone()
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def convert_classifier(state_dict: Mapping[str, Tensor], fields: AdmFields) -> EncoderUNetModel:
    """The classifier of ``fields`` with these weights, float32 and frozen on the CPU. ``ModelError`` for others."""
    with torch.device("meta"):
        classifier = build_classifier(fields)
    _check_fit(state_dict, {key: tuple(value.shape) for key, value in classifier.state_dict().items()})
    classifier.load_state_dict({key: value.float().clone() for key, value in state_dict.items()}, assign=True)
    return classifier.eval().requires_grad_(False)


def build_unet(adm: AdmFields) -> nn.Module:
    """The UNet2DModel of an ADM, its weights not yet those of any."""
    from diffusers import UNet2DModel

    levels = range(len(adm.multipliers))
    plain = "Resnet{}sampleBlock2D" if adm.resblock_updown else "{}Block2D"
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
            _set_heads(module, _heads_at(path, adm))
    return network


def _heads_at(path: str, adm: AdmFields) -> int:
    """Heads of the attention at a path in the UNet2DModel, whose up blocks count from the last level."""
    block, place = path.split(".")[:2]
    if block == "up_blocks":
        return adm.head_counts[len(adm.multipliers) - 1 - int(place)][1]
    return adm.head_counts[int(place) if block == "down_blocks" else -1][0]


def _set_heads(attention: Any, heads: int) -> None:
    attention.heads = heads
    attention.scale = (attention.inner_dim // heads) ** -0.5


def build_classifier(adm: AdmFields) -> EncoderUNetModel:
    """The classifier that guides this ADM, its weights not yet those of any. ``ConfigError`` where it cannot be."""
    if adm.classifier_pool != "attention":
        raise ConfigError(choose_from("ADM field classifier_pool", adm.classifier_pool, ["attention"]))
    multipliers = _multipliers("classifier_channel_mult", adm.classifier_channel_mult, adm.image_size)
    text = adm.classifier_attention_resolutions
    heads = adm.classifier_num_head_channels
    if adm.classifier_width % GROUPS or heads < 1 or any(m * adm.classifier_width % heads for m in multipliers):
        raise ConfigError(
            f"ADM fields: classifier_width is {adm.classifier_width}, but must be a multiple of {GROUPS} and of "
            f"classifier_num_head_channels {heads}"
        )
    if adm.image_size % 2 ** (len(multipliers) - 1):
        raise ConfigError(f"ADM field image_size {adm.image_size} cannot be halved {len(multipliers) - 1} times")
    return EncoderUNetModel(
        image_size=adm.image_size,
        in_channels=CHANNELS,
        model_channels=adm.classifier_width,
        out_channels=adm.num_classes,
        num_res_blocks=adm.classifier_depth,
        attention_resolutions=_factors("classifier_attention_resolutions", text, adm.image_size),
        channel_mult=multipliers,
        num_head_channels=heads,
        use_scale_shift_norm=adm.classifier_use_scale_shift_norm,
        resblock_updown=adm.classifier_resblock_updown,
    )


def unit_names(adm: AdmFields) -> dict[str, str]:
    """ADM's module path -> the UNet2DModel's, of residual and attention blocks in execution order.

    The position is AutoDiffusion's layer id (its ``dynamic_unet.py``), and the index of our unit.
    """
    return {source: target for source, target, layers in _blocks(adm) if layers in (RESIDUAL, ATTENTION)}


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


def _blocks(adm: AdmFields) -> Iterator[tuple[str, str, Layers]]:
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
    for level in reversed(levels):
        attends = level in adm.attention_levels
        for i in range(depth + 1):
            yield f"output_blocks.{block}.0", f"up_blocks.{len(levels) - 1 - level}.resnets.{i}", RESIDUAL
            if attends:
                yield f"output_blocks.{block}.1", f"up_blocks.{len(levels) - 1 - level}.attentions.{i}", ATTENTION
            if level > 0 and i == depth:
                yield f"output_blocks.{block}.{1 + attends}", f"up_blocks.{len(levels) - 1 - level}.upsamplers.0", up
            block += 1


def _modules(adm: AdmFields) -> Iterator[tuple[str, tuple[str, ...]]]:
    """ADM's path of every layer with weights, and the UNet2DModel's paths that hold them."""
    yield "time_embed.0", ("time_embedding.linear_1",)
    yield "time_embed.2", ("time_embedding.linear_2",)
    yield "label_emb", ("class_embedding",)
    yield "input_blocks.0.0", ("conv_in",)
    for source, target, layers in _blocks(adm):
        for name, parts in layers.items():
            yield f"{source}.{name}", tuple(f"{target}.{part}" for part in parts)
    yield "out.0", ("conv_norm_out",)
    yield "out.2", ("conv_out",)


def _shapes(
    names: Mapping[str, tuple[str, ...]], wanted: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of the ADM whose UNet2DModel has the state ``wanted``."""
    for source, targets in names.items():
        projection = source.endswith((".qkv", ".proj_out"))  # a convolution over positions there
        for part in ("weight", "bias"):
            if f"{targets[0]}.{part}" in wanted:
                first, *rest = wanted[f"{targets[0]}.{part}"].shape
                rest += [1] if part == "weight" and projection else []
                yield f"{source}.{part}", (first * len(targets), *rest)


def _split_qkv(value: Tensor, path: str, adm: AdmFields) -> Sequence[Tensor]:
    """q, k and v of the joint projection [3 C, ...] for the attention at ``path``: thirds, or head by head."""
    if adm.use_new_attention_order:
        return value.chunk(3)
    return value.reshape(_heads_at(path, adm), 3, -1, *value.shape[1:]).unbind(1)


def _check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """``ModelError`` that names the first weight that does not fit."""
    check_numbers(given, wanted, "weights do not fit")
    if "input_blocks.0.0.weight" not in given:
        first = f"first key {next(iter(given))!r}" if given else "it is empty"
        raise ModelError(f"is no ADM checkpoint: it has no input_blocks.0.0.weight ({first}); give one")
    advice = "give the preset or the fields it was trained with"
    for key, shape in wanted.items():
        if key in given and tuple(given[key].shape) != tuple(shape):
            raise ModelError(
                f"weights do not fit the preset or fields, {key} has shape {list(given[key].shape)} instead of "
                f"{list(shape)}; {advice}"
            )
    for what, keys in (
        ("missing", [key for key in wanted if key not in given]),
        ("unexpected", [key for key in given if key not in wanted]),
    ):
        if keys:
            raise ModelError(
                f"weights do not fit the preset or fields, {len(keys)} {what}, first {keys[0]!r}; {advice}"
            )


def noise_schedule(adm: AdmFields) -> NoiseSchedule:
    """The levels an ADM was trained on; with ``rescale_timesteps`` the network takes times in [0, 1000)."""
    try:
        schedule = SCHEDULES[adm.noise_schedule](adm.diffusion_steps)
    except ConfigError as error:
        raise ConfigError(f"ADM fields noise_schedule and diffusion_steps {adm.diffusion_steps}: {error}") from error
    factor = 1000 / adm.diffusion_steps if adm.rescale_timesteps else 1.0
    return replace(schedule, model_times=np.arange(schedule.T, dtype=np.float64) * factor)


def _units(network: nn.Module, adm: AdmFields, place: torch.device) -> Units:
    """Found on the smallest images that the network takes: the order is the same and the pass costs nothing."""
    side = 2 ** len(adm.multipliers)  # two at the last level: norms refuse a single value
    x, t = torch.zeros(1, CHANNELS, side, side, device=place), torch.zeros(1, device=place)
    label = torch.zeros(1, dtype=torch.int64, device=place) if adm.class_cond else None
    return find_units(network, lambda: network(x, t, class_labels=label))


def _denoiser(
    network: nn.Module,
    adm: AdmFields,
    place: torch.device,
    precision: str,
    clip: bool,
    units: Units,
    classifier: Gradient | None,
) -> Denoiser:
    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        label = condition["label"] if adm.class_cond else None
        prediction: Tensor = network(x, model_times, class_labels=label, return_dict=False)[0]
        return prediction

    kind = "sample" if adm.predict_xstart else "epsilon"
    guidance: GuidanceKind = "none" if classifier is None else "classifier"
    return Denoiser(predict, noise_schedule(adm), kind, place, precision, clip, units, guidance, classifier)


def _exact(name: str, module: nn.Module) -> bool:
    """Whether guided-diffusion keeps a module in float32 when the network runs in half precision."""
    return isinstance(module, nn.GroupNorm) or name in ("time_embedding", "conv_out") or name.endswith("time_emb_proj")


def _keep_float32(network: nn.Module, place: torch.device) -> None:
    """Take norms, time embedding and the last convolution out of autocast. (Its attention sums in float32 anyway.)"""
    for name, module in network.named_modules():
        if _exact(name, module):
            module.forward = _in_float32(module.forward, place)


def _in_float32(forward: Callable[..., Any], place: torch.device) -> Callable[..., Any]:
    def exact(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(place.type, enabled=False):
            return forward(x.float(), *args, **kwargs)

    return exact


def _store_reduced(network: nn.Module, precision: str) -> None:
    """``store_reduced`` for all but what is exact, and the first convolution, which tells diffusers the dtype."""
    for name, module in network.named_modules():
        inside = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
        if inside and isinstance(module, (nn.Linear, nn.Conv2d)) and not _exact(name, module):
            store_reduced(module, precision)


def _labels(count: int, place: torch.device, draw: Draw) -> Conditions:
    def rows(chosen: Sequence[int]) -> Condition:
        return {"label": torch.tensor(list(chosen), dtype=torch.int64, device=place)}

    return Conditions("labels", count, rows, None, sha256(f"labels {count} {draw}".encode()).hexdigest(), draw)


def _measured(adm: AdmFields, options: Options) -> dict[str, Any]:
    """What of the fields decides samples."""
    unused = ("own_weights",) if options.classifier else ("own_weights", "classifier_")
    return {name: value for name, value in asdict(adm).items() if not name.startswith(unused)}
