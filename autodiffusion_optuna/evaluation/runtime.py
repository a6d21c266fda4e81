"""What the bits of a value depend on besides its study: the batch, the device and the libraries."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import torch

from autodiffusion_optuna.evaluation.evaluator import Evaluator


def describe_runtime(evaluator: Evaluator) -> dict[str, Any]:
    """Name -> value of all that decides which kernels run, as plain JSON; equal ones compute equal bits.

    ``batch`` is the one that fits now: an evaluator that ran out of memory goes on with a smaller one.
    """
    device = evaluator.model.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        more = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    else:
        name = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
        more = {"threads": torch.get_num_threads()}
    return {"batch": evaluator.fitting_batch, "device": name, **_libraries(), **more}


@functools.cache
def _libraries() -> dict[str, str]:
    """Versions of what computes the network; read once, for they are looked for on the disk."""
    return {name: version(name) for name in ("torch", "diffusers")}
