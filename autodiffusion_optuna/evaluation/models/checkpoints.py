"""Files of weights: finding them in a folder, and reading them without running any code."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodiffusion_optuna.errors import ModelError, first_line
from autodiffusion_optuna.files import check_content, read_json

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"


def find_weights(folder: Path, stem: str = STEM, pickle_stem: str | None = None) -> list[Path]:
    """The files of a network's weights, one or the shards of one; ``ModelError`` where there are none.

    Full precision comes before ``.fp16`` variants, and safetensors before ``.bin``. Shards of which some are not there
    are passed over for a whole set: a partial download has the indices of all. ``pickle_stem``: of ``.bin`` files,
    where they are named otherwise.
    """
    broken: ModelError | None = None
    for variant in ("", "fp16"):
        dot = f".{variant}" if variant else ""
        for kind, name in (("safetensors", stem), ("bin", pickle_stem or stem)):
            single, index = folder / f"{name}{dot}.{kind}", folder / f"{name}.{kind}.index{dot}.json"
            if single.is_file():
                return [single]
            if index.is_file():
                try:
                    return _shards(index)
                except ModelError as error:
                    broken = broken or error
    if broken is not None:
        raise broken
    raise ModelError(missing_file(folder, f"{stem}.safetensors"))


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: has no weight_map of file names; copy it again")
    files = [index.parent / Path(name).name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index}: names {file.name}, which is not there; copy all {len(files)} files of weights")
    return files


def missing_file(folder: Path, name: str) -> str:
    """One line for a file that is not there, with the weights in other formats that are."""
    others = sorted(path.name for path in folder.glob(f"{Path(name).name.split('.')[0]}*"))
    there = f" (it holds {', '.join(others[:4])})" if others else ""
    return f"{folder}: no {name}{there}; give a folder that diffusers' save_pretrained wrote"


def read_weights(files: Sequence[Path], notes: list[str] | None = None) -> dict[str, Tensor]:
    """All tensors of safetensors or ``torch.save`` files by name. ``ModelError`` where one is damaged or holds code.

    They are the files themselves, mapped into memory, but for ``torch.save`` files of torch before 1.6. ``notes``:
    takes a line where a file of a training run holds more than is used.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors":
            weights |= read_checkpoint(file, notes)
            continue
        with open_safetensors(file) as stored:
            weights |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return weights


def read_shapes(files: Sequence[Path], notes: list[str] | None = None) -> dict[str, Tensor]:
    """As ``read_weights``, on the meta device: the numbers are not read."""
    return {name: tensor.to("meta") for name, tensor in read_weights(files, notes).items()}


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """The opened file; what is wrong with it is a ``ModelError``, then and while it is read."""
    from safetensors import SafetensorError, safe_open

    check_content(file, ModelError)
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: is damaged or cut short ({first_line(error)}); copy it again") from error


def read_checkpoint(path: Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """The weights in what ``torch.save`` wrote. Its pickle is read without running what it asks for."""
    check_content(path, ModelError)
    zipped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on pickles that it then refuses
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile file can raise anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise ModelError(
                f"{path}: asks for {asked[1]}, which is code and not run; save the state dict alone, or as safetensors"
            ) from None
        reason = "cannot be read" if zipped else "is damaged or cut short, or is no PyTorch checkpoint"
        raise ModelError(f"{path}: {reason} ({type(error).__name__}); copy it again") from error
    if not isinstance(stored, dict):
        raise ModelError(f"{path}: holds a {type(stored).__name__}, not tensors by name; save the state dict alone")
    weights = _unprefixed(stored if _is_state_dict(stored) else _trained(stored, path, notes))
    if empty := next((name for name, tensor in weights.items() if tensor.is_meta), None):
        raise ModelError(f"{path}: holds the shape of {empty} and no numbers (a meta tensor); save the model again")
    return weights


STATES = {
    "param_groups": "an optimizer's state",
    "base_lrs": "the state of a learning rate's schedule",
    "growth_factor": "the state of a gradient scaler",
    "shadow_params": "a moving average of weights without their names",
}
"""What a training run saves beside its weights, by an entry that each has."""

PREFIXES = re.compile(r"((module|_orig_mod|model)\.)+")
"""What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning."""


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _trained(stored: Mapping[str, Any], path: Path, notes: list[str] | None) -> dict[str, Tensor]:
    """The weights in a checkpoint of a training run: their moving average where it has one, as authors publish it."""
    for entry, what in STATES.items():
        if entry in stored:
            raise ModelError(f"{path}: is {what}; give model*.pt or ema*.pt, or the folder that save_pretrained wrote")
    parts = [key for key, value in stored.items() if _is_state_dict(value) and value]
    averages = [key for key, value in stored.items() if "ema" in str(key).lower() and isinstance(value, dict) and value]
    chosen = averages or parts
    if not parts or len(chosen) != 1 or chosen[0] not in parts:
        held = ", ".join(map(str, [*stored][:6]))
        which = f"several sets of weights ({', '.join(map(str, chosen))})" if len(chosen) > 1 else f"entries {held}"
        raise ModelError(f"{path}: holds {which}, not tensors by name; save the state dict alone")
    if notes is not None and len(stored) > 1:
        others = ", ".join(str(key) for key in stored if key != chosen[0])
        notes.append(f"of {path}, a checkpoint of training, the weights {chosen[0]!r} are used, not {others}")
    weights: dict[str, Tensor] = stored[chosen[0]]
    return weights


def _unprefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    common = {match[0] for match in map(PREFIXES.match, weights) if match}
    if len(common) != 1 or not all(name.startswith((*common,)) for name in weights):
        return weights
    return {name.removeprefix(*common): tensor for name, tensor in weights.items()}
