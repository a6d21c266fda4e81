"""Large networks: built on the meta device, where shapes take no memory, and then filled file by file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.models.checkpoints import read_shapes, read_weights
from autodiffusion_optuna.evaluation.models.parts import fill
from autodiffusion_optuna.evaluation.tensors import Weights, is_scale, plain_weights


def check_fit(network: nn.Module, stored: Weights, file: Path) -> None:
    """``ModelError`` that names the first weight of ``file`` that does not fit the ``network`` on the meta device."""
    fill(network, {name: tensor.to("meta") for name, tensor in stored.items()}, file, "config.json")


def weights_by_file(network: nn.Module, files: Sequence[Path]) -> Iterator[Weights]:
    """The weights of ``network`` in one file after the other; scales may lie in other files than what they scale."""
    wanted = network.state_dict().keys()
    scales: dict[str, Tensor] = {}
    for file in files:
        if names := [name for name in read_shapes([file]) if is_scale(name) and name not in wanted]:
            stored = read_weights([file])
            scales |= {name: stored[name].clone() for name in names}
    for file in files:
        yield plain_weights(read_weights([file]), file, wanted, scales)


def materialise(network: nn.Module, weights: Iterable[Weights], device: torch.device) -> None:
    """Give ``network`` all its weights, in its own dtypes, on ``device`` and frozen.

    They go to the device a piece at a time, so that no more than one piece lies in main memory besides.
    """
    wanted = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    for piece in weights:
        # Copied even where nothing changes: what was read is the file itself, mapped into memory.
        placed = {name: tensor.to(device, wanted[name], copy=True) for name, tensor in piece.items() if name in wanted}
        network.load_state_dict(placed, strict=False, assign=True)
    empty = [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.is_meta]
    if empty:
        raise ModelError(
            f"weights of {type(network).__name__} hold nothing for {empty[0]!r}, which diffusers computes or renames; "
            "load the model in diffusers and save it with save_pretrained"
        )
    network.eval().requires_grad_(False)
