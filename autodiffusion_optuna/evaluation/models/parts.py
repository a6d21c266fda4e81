"""Parts of a model as diffusers saves them: a network with its config and weights, a scheduler's config."""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.denoiser import PREDICTIONS, store_reduced
from autodiffusion_optuna.evaluation.files import check_content
from autodiffusion_optuna.noise import NoiseSchedule, from_scheduler_config

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True, eq=False)
class Part:
    """A frozen network on the CPU, the config it was built from, and the files of its weights.

    ``config`` has the values written in ``config.json`` alone; ``network.config`` has the defaults too.
    """

    network: nn.Module
    config: Mapping[str, Any]
    files: Sequence[Path]


@dataclass(frozen=True, eq=False)
class Scheduler:
    """Noise schedule and prediction type (a name of ``PREDICTIONS``) of a scheduler's config."""

    schedule: NoiseSchedule
    prediction: str
    config: Mapping[str, Any]


def read_config(folder: Path, kinds: Collection[str]) -> dict[str, Any]:
    """``config.json`` of the network in ``folder``; ``ModelError`` where there is none of a class in ``kinds``."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(_missing(folder, path.name))
    config = read_json(path)
    if config.get("_class_name") not in kinds:
        raise ModelError(f"{path}: describes a {config.get('_class_name')}; only {' or '.join(kinds)} is supported")
    return config


def load_part(folder: Path, kind: str, config: Mapping[str, Any], precision: str | None = None) -> Part:
    """The network in ``folder``, of diffusers' class ``kind`` and with its weights.

    ``precision``: keep the weights in it (``denoiser.store_reduced``); None: float32. Nothing is downloaded.
    ``ModelError`` where weights are missing or broken or do not fit the config.
    """
    path = folder / "config.json"
    files = find_weights(folder)
    network = _build(kind, config, path)
    fill(network, read_weights(files), files[0], path.name)
    if precision is not None:
        for child in list(network.children())[1:]:  # the first one, which is small, tells diffusers the dtype
            store_reduced(child, precision)
    return Part(network.eval().requires_grad_(False), config, files)


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
    raise ModelError(_missing(folder, f"{stem}.safetensors"))


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: has no weight_map of file names; copy it anew")
    files = [index.parent / Path(name).name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index}: names {file.name}, which is not there; copy all {len(files)} files of weights")
    return files


def _missing(folder: Path, name: str) -> str:
    """One line for a file that is not there, with the weights in other formats that are."""
    others = sorted(path.name for path in folder.glob(f"{Path(name).name.split('.')[0]}*"))
    there = f" (it holds {', '.join(others[:4])})" if others else ""
    return f"{folder}: no {name}{there}; give a folder that diffusers' save_pretrained wrote"


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors or ``torch.save`` files by name. ``ModelError`` where one is damaged or holds code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in files:
        check_content(file, ModelError)
        if file.suffix != ".safetensors":
            weights |= read_checkpoint(file)
            continue
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{file}: is damaged or cut short ({first_line(error)}); copy it anew") from error
    return weights


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """What ``torch.save`` wrote. Its pickle is read without running what it asks for."""
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
        raise ModelError(f"{path}: {reason} ({type(error).__name__}); copy it anew") from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        held = (
            f"entries {', '.join(map(str, [*stored][:3]))}"
            if isinstance(stored, dict)
            else f"a {type(stored).__name__}"
        )
        raise ModelError(f"{path}: holds {held}, not tensors by name; save the state dict alone")
    return stored


class _Uninitialised(TorchFunctionMode):
    """Leaves new weights as they are: they are about to be overwritten, and drawing them takes most of a load."""

    DRAWS = (Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS or getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _build(kind: str, config: Mapping[str, Any], path: Path) -> nn.Module:
    """The network a config describes, in float32 with arbitrary weights. diffusers' warnings are not shown."""
    import diffusers

    built: Any = getattr(diffusers, kind)
    known = inspect.signature(built.__init__).parameters
    try:
        with _Uninitialised():
            network: nn.Module = built.from_config({key: value for key, value in config.items() if key in known})
    except Exception as error:  # whatever a constructor makes of a wrong value
        raise ModelError(f"{path}: diffusers cannot build this model ({first_line(error)})") from error
    return network


LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern(key: str) -> str:
    """The present name of a weight; older versions of diffusers named attention's projections otherwise."""
    return ".".join(LEGACY.get(part, part) for part in key.split("."))


def fill(network: nn.Module, stored: Mapping[str, Tensor], file: Path, config: str) -> None:
    """Give ``network`` exactly the weights ``stored``, in its own dtypes.

    ``ModelError`` that names the first weight that does not fit, and ``file`` and ``config``.
    """
    wanted = network.state_dict()
    given = {key if key in wanted else _modern(key): value for key, value in stored.items()}
    fits = f"{file}: weights do not fit {config}, "
    for key in sorted(given.keys() & wanted.keys()):
        shape, expected = list(given[key].shape), list(wanted[key].shape)
        if shape != expected:
            raise ModelError(f"{fits}{key} has shape {shape} instead of {expected}; take both from one model")
    for what, keys in (
        ("missing", wanted.keys() - given.keys()),
        ("unexpected", given.keys() - wanted.keys()),
    ):
        if keys:
            raise ModelError(f"{fits}{len(keys)} {what}, first {min(keys)!r}; take both from one model")
    network.load_state_dict(given)


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


def load_scheduler(folder: Path) -> Scheduler:
    """The scheduler in or beneath ``folder``. ``ModelError`` where there is none of a known kind."""
    places = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ModelError(
            f"{folder}: no noise schedule; looked for {SCHEDULER} and scheduler/{SCHEDULER}. "
            "Save the scheduler the model was trained with there (scheduler.save_pretrained)"
        )
    config = read_json(path)
    return Scheduler(_noise_schedule(config, path), _prediction(config, path), config)


def _noise_schedule(config: Mapping[str, Any], path: Path) -> NoiseSchedule:
    kind = str(config.get("_class_name", ""))
    if not ({"beta_schedule", "trained_betas"} & config.keys() or "FlowMatch" in kind):
        raise ModelError(f"{path}: {kind or 'this config'} has no betas; save a DDPM- or flow-matching scheduler")
    try:
        return from_scheduler_config(config)
    except (ConfigError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from error


def _prediction(config: Mapping[str, Any], path: Path) -> str:
    """What the network predicts; flow-matching schedulers do not say, as they know of one kind only."""
    flow = "FlowMatch" in str(config.get("_class_name", ""))
    kind = config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")
    if kind not in PREDICTIONS:
        raise ModelError(f"{path}: {choose_from('prediction_type', str(kind), PREDICTIONS)}")
    return str(kind)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ``ModelError`` where the file holds none."""
    check_content(path, ModelError)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({first_line(error)}); save it anew") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds a JSON {type(data).__name__}, expected an object; save it anew")
    return data


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 200 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
