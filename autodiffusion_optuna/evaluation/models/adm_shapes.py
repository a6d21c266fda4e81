"""What the names and shapes of an ADM's weights tell of its architecture, so that a checkpoint need not be explained.

Part of it leaves no trace there: the image size, the number of attention heads, the order of q, k and v and the noise
schedule. A published model is recognised by the rest, and its preset says these too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.models.adm_fields import PRESETS, AdmFields

FIRST = "input_blocks.0.0.weight"


def is_adm(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of guided-diffusion's UNet: latent diffusion's, of the same names, attends to text."""
    return FIRST in weights and "out.2.weight" in weights and not any("transformer_blocks" in name for name in weights)


def visible_fields(weights: Mapping[str, Tensor], image_size: int | None) -> dict[str, Any]:
    """The fields of ``AdmFields`` that weights under guided-diffusion's names tell, for images of that side.

    Without an ``image_size`` the sides at which there is attention are given for the smallest image there can be.
    ``ModelError`` where the blocks are none of an ADM's.
    """
    try:
        return _fields(weights, image_size)
    except (KeyError, ZeroDivisionError, StopIteration) as error:
        raise ModelError(f"its blocks are not those of an ADM ({error}); write a plug-in for it") from error


def _fields(weights: Mapping[str, Tensor], image_size: int | None) -> dict[str, Any]:
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("output_blocks."))
    # The last output block of a level resamples; where none does, there is one level.
    resampling = (i for i in range(blocks) if any(_resamples(weights, i, part) for part in ("1", "2")))
    depth = next(resampling, blocks - 1)
    levels = range(blocks // (depth + 1))
    width = len(weights[FIRST])
    first = [1 + level * (depth + 1) for level in levels]  # input block with which each level begins
    widths = [len(weights[f"input_blocks.{block}.0.out_layers.3.weight"]) for block in first]
    attending = [level for level in levels if f"input_blocks.{first[level]}.1.qkv.weight" in weights]
    side = image_size or 2 ** levels[-1]
    classes = weights.get("label_emb.weight")
    return {
        "num_channels": width,
        "num_res_blocks": depth,
        "channel_mult": ",".join(str(other // width) for other in widths),
        "attention_resolutions": ",".join(str(side // 2**level) for level in attending) or str(2 * side),
        "learn_sigma": len(weights["out.2.weight"]) == 2 * weights[FIRST].shape[1],
        "class_cond": classes is not None,
        "num_classes": 0 if classes is None else len(classes),
        "use_scale_shift_norm": len(weights["input_blocks.1.0.emb_layers.1.weight"]) == 2 * widths[0],
        "resblock_updown": f"input_blocks.{depth + 1}.0.in_layers.0.weight" in weights,
    }


def _resamples(weights: Mapping[str, Tensor], block: int, part: str) -> bool:
    start = f"output_blocks.{block}.{part}"
    return f"{start}.conv.weight" in weights or f"{start}.in_layers.0.weight" in weights


def matching_presets(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the published models that have exactly this architecture."""
    return [name for name, preset in PRESETS.items() if _describes(preset, weights)]


def _describes(preset: AdmFields, weights: Mapping[str, Tensor]) -> bool:
    found = visible_fields(weights, preset.image_size)
    return (
        found["num_channels"] == preset.num_channels
        and found["num_res_blocks"] == preset.num_res_blocks
        and tuple(int(part) for part in found["channel_mult"].split(",")) == preset.multipliers
        and {int(side) for side in found["attention_resolutions"].split(",")}
        == {preset.image_size // 2**level for level in preset.attention_levels}
        and found["num_classes"] == (preset.num_classes if preset.class_cond else 0)
        and all(
            found[name] == getattr(preset, name) for name in ("learn_sigma", "use_scale_shift_norm", "resblock_updown")
        )
    )
