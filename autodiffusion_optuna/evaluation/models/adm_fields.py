"""The architecture and noise of an ADM (arXiv 2105.05233), which a checkpoint of guided-diffusion does not say.

Part of it leaves no trace in the weights: the order of q, k and v, the number of attention heads, the noise schedule
and how times are scaled. A wrong one of these loads and samples badly. ``check_fields`` refuses what contradicts a
published model of exactly the same architecture; for any other architecture nothing can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autodiffusion_optuna.errors import ConfigError, choose_from
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
        return level_multipliers("channel_mult", self.channel_mult, self.image_size)

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """Levels that have attention, 0 being the full size; the middle block always has it."""
        factors = downsampling_factors("attention_resolutions", self.attention_resolutions, self.image_size)
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
    names = ("image_size", "num_channels", "num_res_blocks", "learn_sigma", "use_scale_shift_norm", "resblock_updown")
    classes = adm.num_classes if adm.class_cond else 0
    return (classes, adm.multipliers, adm.attention_levels, *(getattr(adm, name) for name in names))


def _invisible(adm: AdmFields) -> dict[str, object]:
    """What they do not tell."""
    levels = sorted({*adm.attention_levels, len(adm.multipliers) - 1})
    return {
        "use_new_attention_order": adm.use_new_attention_order,
        "attention heads (encoder, decoder) by level": [adm.head_counts[level] for level in levels],
        "noise_schedule": adm.noise_schedule,
    }


def level_multipliers(name: str, text: str, image_size: int) -> tuple[int, ...]:
    """Integers of the field ``name``, or those of the image size where it is empty."""
    if not text and image_size not in MULTIPLIERS:
        sizes = ", ".join(str(size) for size in MULTIPLIERS)
        raise ConfigError(f"ADM field {name} is empty, which is for image_size {sizes}, not {image_size}; give it")
    text = text or MULTIPLIERS[image_size]
    if text.split(",")[0].strip() == "0.5":
        raise ConfigError(f"ADM field {name} is {text!r} (image_size {image_size}): {FIRST_WIDTH}")
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise ConfigError(f"ADM field {name} is {text!r}; give integers with commas between, as '1,2,3,4'")
    if image_size % 2 ** (len(numbers) - 1):
        raise ConfigError(f"ADM field image_size {image_size} cannot be halved {len(numbers) - 1} times")
    return numbers


def downsampling_factors(name: str, text: str, image_size: int) -> tuple[int, ...]:
    """Downsampling factors of sides in pixels, as guided-diffusion rounds them."""
    try:
        return tuple(image_size // int(side) for side in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"ADM field {name} is {text!r}; give sides in pixels with commas between") from None


def noise_schedule(adm: AdmFields) -> NoiseSchedule:
    """The levels an ADM was trained on; with ``rescale_timesteps`` the network takes times in [0, 1000)."""
    try:
        schedule = SCHEDULES[adm.noise_schedule](adm.diffusion_steps)
    except ConfigError as error:
        raise ConfigError(f"ADM fields noise_schedule and diffusion_steps {adm.diffusion_steps}: {error}") from error
    factor = 1000 / adm.diffusion_steps if adm.rescale_timesteps else 1.0
    return replace(schedule, model_times=np.arange(schedule.T, dtype=np.float64) * factor)
