"""Large networks, built without memory and then filled file by file."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.files import check_content
from autodiffusion_optuna.evaluation.models.parts import fill, first_line, read_weights

Weights = Mapping[str, Tensor]
"""Tensors by name."""


def blueprint(kind: str, config: Mapping[str, Any], path: Path) -> nn.Module:
    """The network of diffusers' class ``kind`` that a config describes, on the meta device: shapes without memory.

    ``ModelError`` that names ``path`` where the config describes none.
    """
    import diffusers

    built: Any = getattr(diffusers, kind)
    known = inspect.signature(built.__init__).parameters
    try:
        with torch.device("meta"):
            network: nn.Module = built.from_config({key: value for key, value in config.items() if key in known})
    except Exception as error:  # whatever a constructor makes of a wrong value
        raise ModelError(f"{path}: diffusers cannot build this model ({first_line(error)})") from error
    return network


def check_fit(network: nn.Module, shapes: Mapping[str, Sequence[int]], file: Path, config: str) -> None:
    """``ModelError`` that names the first weight of ``file``, given by shape, that ``network`` lacks or misses."""
    fill(network, {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}, file, config)


def stored_shapes(files: Sequence[Path]) -> dict[str, Sequence[int]]:
    """Shape of every tensor in the files, whose data is not read. ``ModelError`` where one is damaged."""
    return {name: shape for file in files for name, shape in _shapes(file).items()}


def _shapes(file: Path) -> Mapping[str, Sequence[int]]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return {name: tensor.shape for name, tensor in read_weights([file]).items()}
    check_content(file, ModelError)
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is damaged or cut short ({first_line(error)}); copy it anew") from error


def each_file(files: Sequence[Path]) -> Iterable[Weights]:
    """The tensors of one file after the other."""
    return (read_weights([file]) for file in files)


def materialise(network: nn.Module, parts: Iterable[Weights], device: torch.device) -> nn.Module:
    """``network`` with all its weights, in its own dtypes, on ``device`` and frozen.

    Weights go to the device a part at a time, so that no more than one part lies in main memory besides.
    """
    wanted = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    for part in parts:
        # Copied even where nothing changes: what was read is the file itself, mapped into memory.
        placed = {name: tensor.to(device, wanted[name], copy=True) for name, tensor in part.items() if name in wanted}
        network.load_state_dict(placed, strict=False, assign=True)
    empty = [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.is_meta]
    if empty:
        raise ModelError(
            f"weights of {type(network).__name__} hold nothing for {empty[0]!r}, which diffusers computes or renames; "
            "load the model in diffusers and save it with save_pretrained"
        )
    return network.eval().requires_grad_(False)


def read_single_file(path: Path, kind: str, config: Path, subfolder: str) -> dict[str, Tensor]:
    """Weights of diffusers' class ``kind`` from one file in the layout of its authors, by diffusers' names.

    Where the file holds a moving average besides the weights in training, it is the average, as in the folders that
    the authors publish. ``config``: a pipeline's folder, in whose ``subfolder`` the class's config lies.
    ``ModelError`` where the file does not hold such weights, ``ConfigError`` where diffusers cannot read single files
    of this class.
    """
    import diffusers

    original: Any = getattr(diffusers, kind)
    if not hasattr(original, "from_single_file"):
        raise ConfigError(f"{path}: diffusers cannot read a {kind} from a single file; give the folder of its pipeline")
    converted: dict[str, Tensor] = {}

    def from_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return super(caught, cls).from_config(*args, **kwargs)

    def load_state_dict(self: nn.Module, weights: Weights, strict: bool = True) -> tuple[list[str], list[str]]:
        converted.update(weights)
        return [], []

    # The class itself would leave weights that the file lacks at random, and say so nowhere.
    methods = {"from_config": classmethod(from_config), "load_state_dict": load_state_dict}
    caught: Any = type(kind, (original,), methods)
    log = diffusers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        caught.from_single_file(
            str(path),
            config=str(config),
            subfolder=subfolder,
            local_files_only=True,
            low_cpu_mem_usage=False,
            extract_ema=True,
        )
    except Exception as error:  # a KeyError for a weight that is not there, and whatever else
        raise ModelError(
            f"{path}: holds no weights of the {kind} in {config / subfolder} ({type(error).__name__}: "
            f"{first_line(error)}); give model.config the folder of a pipeline of the same kind"
        ) from error
    finally:
        log.set_verbosity(level)
    return converted
