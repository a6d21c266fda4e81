"""What lies beside the weights in a checkpoint: applied to them, left out knowingly, or refused by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from autodiffusion_optuna.errors import ModelError

Weights = Mapping[str, Tensor]
"""Tensors by name."""

SCALE = re.compile(r"(.*\.)?(scale_weight|weight_scale)")
"""What a float8 weight beside it is to be multiplied by, as ComfyUI and compressed-tensors name it."""

REFUSED = {
    "scales of a quantisation by bitsandbytes": r"(nested_)?(absmax|quant_map)|quant_state|SCB|weight_format",
    "scales of a quantisation (GPTQ, AWQ and the like)": (
        r"q?(weight|scales|zeros)_(packed|shape|scale_inv|scale_\d|global_scale|zero_point)|qweight|qzeros|[qw]?scales|"
        r"zeros|g_idx|zero_point|smooth(_factor)?|output_scale|_data|_scale"
    ),
    "a LoRA or another adapter": r"lora_.*|.*_lora|alpha|hada_\w+|lokr_\w+|oft_\w+|dora_scale|diff(_b)?",
    "weights in parts (weight norm, spectral norm, pruning)": r"weight_[guv]|weight_(orig|mask)|parametrizations",
}
"""What tensors are without which the weights mean something else -> pattern of one part of their names."""

LEFT_OUT = re.compile(
    # buffers of training with betas, and its moving average's counters
    r"logvar|betas|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|denoiser\.(log_)?sigmas|"
    r"model_ema\.(decay|num_updates)|"
    # counters of places, and what products in float8 would need of their inputs: here they are of float32
    r"(.*\.)?(position_ids|scaled_fp8|scale_input|input_scale|comfy_quant)"
)
"""Names of tensors that do not change what weights mean."""

PLAIN = "give the model's own weights, not quantised ones"


def plain_weights(
    stored: Weights,
    file: Path,
    wanted: Collection[str] = (),
    scales: Weights | None = None,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """The weights among the tensors ``stored`` in ``file``, float8 ones multiplied by the scales beside them.

    Names in ``wanted`` are weights whatever they are called; others that nothing is known of are kept for the caller.
    ``scales``: those of the whole model where ``stored`` is a part of it. ``dtype``: of scaled weights, which are
    multiplied in float32 and take its room where they are many. ``ModelError`` that names what would change
    the weights and is not applied here. Tensors may be on the meta device.
    """
    beside = [key for key in stored if key not in wanted]
    for what, pattern in REFUSED.items():
        found = [key for key in beside if any(re.fullmatch(pattern, part) for part in key.split("."))]
        if found:
            raise ModelError(
                f"{file}: holds {what}: {len(found)} tensors, first {found[0]!r}, without which the others mean "
                f"something else; {PLAIN}, with adapters merged into them"
            )
    for key, tensor in stored.items():
        if tensor.layout != torch.strided:
            raise ModelError(f"{file}: {key} is {str(tensor.layout).removeprefix('torch.')}; save it with to_dense()")
    dropped = {key for key in beside if LEFT_OUT.fullmatch(key) or SCALE.fullmatch(key)}
    weights = {key: tensor for key, tensor in stored.items() if key not in dropped}
    for key, scale in (stored if scales is None else scales).items():
        if not SCALE.fullmatch(key) or key in wanted:
            continue
        target = ".".join([*key.split(".")[:-1], "weight"])
        if target in weights:
            weights[target] = _scaled(weights[target], scale, f"{file}: {key}").to(dtype)
        elif scales is None:
            raise ModelError(f"{file}: {key} scales {target}, which is not there; {PLAIN}")
    return weights


def _scaled(weight: Tensor, scale: Tensor, where: str) -> Tensor:
    """``weight`` times a scale, one for all or one for each of its rows, in float32: float8 is exact in it."""
    rows = weight.shape[:1]
    shapes = {rows, rows + (1,) * (weight.ndim - 1)}
    plain = weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and scale.is_floating_point()
    if not plain or not (scale.numel() == 1 or scale.shape in shapes) or not (scale.is_meta or scale.isfinite().all()):
        raise ModelError(
            f"{where} is {_described(scale)} and its weight {_described(weight)}; only finite scales of float8 weights "
            f"are known, one for all or one a row; {PLAIN}"
        )
    return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))


def check_numbers(given: Weights, floating: Iterable[str], where: object) -> None:
    """``ModelError`` that names the first weight in ``floating`` that does not hold floating-point numbers."""
    for key in sorted(given.keys() & set(floating)):
        if not isinstance(given[key], Tensor) or not given[key].is_floating_point():
            raise ModelError(f"{where}: {key} holds {_described(given[key])}, not floating-point numbers; {PLAIN}")


def misfit(given: Weights, wanted: Mapping[str, Sequence[int]]) -> str | None:
    """How tensors first differ in shapes and names from those of a network; None where they do not."""
    for key, shape in wanted.items():
        if key in given and tuple(given[key].shape) != tuple(shape):
            return f"{key} has shape {list(given[key].shape)} instead of {list(shape)}"
    for what, keys in (
        ("missing", [key for key in wanted if key not in given]),
        ("unexpected", [key for key in given if key not in wanted]),
    ):
        if keys:
            return f"{len(keys)} {what}, first {keys[0]!r}"
    return None


def _described(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
