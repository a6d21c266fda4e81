"""Parts of a model as diffusers saves them: a pipeline's folder, and a network in it with its config and weights."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ModelError, first_line
from autodiffusion_optuna.evaluation.denoiser import store_reduced
from autodiffusion_optuna.evaluation.models.checkpoints import (
    STEM,
    find_weights,
    missing_file,
    read_shapes,
    read_weights,
)
from autodiffusion_optuna.evaluation.tensors import PLAIN, SCALE, Weights, check_numbers, misfit, plain_weights
from autodiffusion_optuna.files import read_json

INDEX = "model_index.json"


@dataclass(frozen=True)
class Pipeline:
    """A diffusers folder and its ``model_index.json``, empty where it has none.

    ``network``: which folder in it is to be its network, ``""`` for the one that it names itself.
    """

    folder: Path
    index: Mapping[str, Any]
    network: str = ""

    @property
    def kind(self) -> str:
        """Class of the pipeline; ``""`` for a bare network."""
        return str(self.index.get("_class_name", ""))


def find_pipeline(folder: Path) -> Pipeline:
    """The pipeline in ``folder``, or the one of which ``folder`` is the network (``.../unet_ema``).

    ``ModelError`` where its index cannot be read.
    """
    whole, network = Path(os.path.abspath(folder)), ""
    if (folder / "config.json").is_file() and not (folder / INDEX).exists() and (whole.parent / INDEX).is_file():
        folder, network = whole.parent, whole.name
    return Pipeline(folder, read_json(folder / INDEX) if (folder / INDEX).is_file() else {}, network)


def read_config(folder: Path, kinds: Collection[str]) -> dict[str, Any]:
    """``config.json`` of the network in ``folder``; ``ModelError`` where there is none of a class in ``kinds``."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(missing_file(folder, path.name))
    config = read_json(path)
    if config.get("_class_name") not in kinds:
        raise ModelError(f"{path}: describes a {config.get('_class_name')}; only {' or '.join(kinds)} is supported")
    if config.get("quantization_config"):
        raise ModelError(f"{path}: has a quantization_config; {PLAIN}")
    return config


def load_part(
    folder: Path, kind: str, config: Mapping[str, Any], precision: str = "float32"
) -> tuple[nn.Module, list[Path], list[str]]:
    """The network in ``folder``, of diffusers' class ``kind``, frozen on the CPU, and the files of its weights.

    Its weights are kept in ``precision``. The third value says what the files do not say and was assumed, or hold
    besides, a line each. Nothing is downloaded. ``ModelError`` where weights are missing, broken or do not fit the
    config.
    """
    from diffusers.models.modeling_utils import no_init_weights

    network = build_network(kind, config, folder / "config.json", no_init_weights())  # drawing them would take long
    files, notes = fitting_weights(network, folder, config)
    for child in list(network.children())[1:]:  # the first one, which is small, tells diffusers the dtype
        store_reduced(child, precision)
    materialise(network, weights_by_file(network, files), torch.device("cpu"))
    return network, files, notes


def build_network(
    kind: str, config: Mapping[str, Any], path: Path, mode: contextlib.AbstractContextManager[Any]
) -> nn.Module:
    """The network of diffusers' class ``kind`` that the config at ``path`` describes, with arbitrary weights.

    ``mode``: how it is built, such as ``torch.device("meta")``, without memory. ``ModelError`` where there is none.
    """
    import diffusers

    built: Any = getattr(diffusers, kind)
    known = inspect.signature(built.__init__).parameters  # from_config warns of others
    try:
        with mode:
            network: nn.Module = built.from_config({key: value for key, value in config.items() if key in known})
    except Exception as error:  # whatever a constructor makes of a wrong value
        raise ModelError(f"{path}: diffusers cannot build this model ({first_line(error)})") from error
    return network


LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What older versions of diffusers called attention's projections -> their present names."""


def _renamed(weights: Weights, wanted: Collection[str]) -> dict[str, Tensor]:
    """``weights`` by their present names."""
    present = {name: ".".join(LEGACY.get(part, part) for part in name.split(".")) for name in weights}
    return {name if name in wanted else present[name]: tensor for name, tensor in weights.items()}


def check_fit(network: nn.Module, stored: Weights, file: Path) -> None:
    """``ModelError`` that names the first weight ``stored`` in ``file`` that does not fit; no number is looked at."""
    wanted = network.state_dict()
    given = _renamed(plain_weights(stored, file, wanted), wanted)
    if problem := misfit(given, {name: tensor.shape for name, tensor in wanted.items()}):
        raise ModelError(f"{file}: weights do not fit config.json, {problem}; take both from one model")
    check_numbers(given, (name for name, tensor in wanted.items() if tensor.is_floating_point()), file)


def fitting_weights(network: nn.Module, folder: Path, config: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """The files of a network's weights in ``folder``, all of which fit, and what is to be said of them and ``config``.

    That is what the config does not say and no weight shows, and what other weights there are, a line each.
    """
    files, notes = find_weights(folder), list[str]()
    check_fit(network, read_shapes(files, notes), files[0])
    full: Any = network.config
    absent = [key for key in INVISIBLE if key in full and key not in config and not is_settled(key, config)]
    if absent:
        notes.append(assumed(folder / "config.json", {key: full[key] for key in absent}))
    used = _variant(files[0].name)
    others = sorted(path.name for path in folder.iterdir() if (_variant(path.name) or used) not in (used, *ROUNDED))
    if others:
        notes.append(f"{folder}: {files[0].name} is used, not {', '.join(others)} beside it")
    return files, notes


def weights_by_file(network: nn.Module, files: Sequence[Path]) -> Iterator[Weights]:
    """The weights of ``network`` in one file after the other; scales may lie in other files than what they scale."""
    wanted = network.state_dict().keys()
    scales: dict[str, Tensor] = {}
    for file in files:
        if names := [name for name in read_shapes([file]) if SCALE.fullmatch(name) and name not in wanted]:
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
        placed = {
            name: tensor.to(device, wanted[name], copy=True, memory_format=torch.contiguous_format)
            for name, tensor in _renamed(piece, wanted).items()
            if name in wanted
        }
        network.load_state_dict(placed, strict=False, assign=True)
    empty = [name for name, tensor in [*network.named_parameters(), *network.named_buffers()] if tensor.is_meta]
    if empty:
        raise ModelError(
            f"weights of {type(network).__name__} hold nothing for {empty[0]!r}, which diffusers computes or renames; "
            "load the model in diffusers and save it with save_pretrained"
        )
    network.eval().requires_grad_(False)


def digest(files: Sequence[Path], *configs: Mapping[str, Any]) -> str:
    """sha256 over configs, without what tells only where they came from, and files of weights."""
    ignored = {"_diffusers_version", "_name_or_path"}
    whole = hashlib.sha256()
    for config in configs:
        kept = {key: value for key, value in config.items() if key not in ignored}
        whole.update(json.dumps(kept, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


INVISIBLE = (
    "act_fn", "activation_fn", "attention_head_dim", "flip_sin_to_cos", "freq_shift", "mid_block_scale_factor",
    "norm_eps", "norm_num_groups", "time_embedding_type",
)  # fmt: skip
"""Facts of a network that change what it computes and neither names nor shapes of its weights."""

ROUNDED = (".fp16", ".bf16")
"""Variants that hold the same weights, rounded."""

UNKNOWN_BEFORE = {"prediction_type": (0, 8), "scaling_factor": (0, 11), "time_embedding_type": (0, 11)}
"""Facts of which diffusers before these versions knew one value, the present default, and named none in its files."""


def is_settled(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a ``config`` without a fact is of a diffusers that knew its default alone, as Stable Diffusion 1.5's."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    old = version is not None and (int(version[1]), int(version[2])) < UNKNOWN_BEFORE.get(key, (0, 0))
    return old and config.get("predict_epsilon", True) is True  # what came before prediction_type


def assumed(path: Path | str, values: Mapping[str, Any]) -> str:
    """One line for defaults that stand in for what the file at ``path`` does not say."""
    listed = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    return f"{path} does not say all; assumed is the default of its class: {listed}"


def _variant(name: str) -> str | None:
    """``""``, ``"fp16"``, ``"non_ema"`` and so on of a file of weights, None for other files."""
    match = re.fullmatch(rf"{STEM}(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(safetensors|bin)", name)
    return None if match is None else f".{match['variant'] or ''}"


def networks_beside(folder: Path) -> tuple[str, ...]:
    """A line where other copies of the network lie beside its ``folder``, as a moving average does after training."""
    base = folder.name.replace("ema_", "").replace("_ema", "")
    names = {base, f"{base}_ema", f"ema_{base}"} - {folder.name}
    others = sorted(name for name in names if (folder.parent / name / "config.json").is_file())
    if not others:
        return ()
    return (f"{folder} is used, not {', '.join(others)} beside it; give {folder.parent / others[0]} for that one",)
