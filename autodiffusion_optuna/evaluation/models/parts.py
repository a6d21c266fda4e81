"""Parts of a model as diffusers saves them: a network with its config and weights, a scheduler's config."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from
from autodiffusion_optuna.evaluation.denoiser import PREDICTIONS, store_reduced
from autodiffusion_optuna.evaluation.files import check_content
from autodiffusion_optuna.evaluation.tensors import PLAIN, check_numbers, weights_of
from autodiffusion_optuna.noise import NoiseSchedule, from_scheduler_config

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True, eq=False)
class Part:
    """A frozen network on the CPU, the config it was built from, and the files of its weights.

    ``config`` has the values written in ``config.json`` alone; ``network.config`` has the defaults too.
    ``notes``: what the files do not say and was assumed, or hold besides, a line each.
    """

    network: nn.Module
    config: Mapping[str, Any]
    files: Sequence[Path]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Scheduler:
    """Noise schedule and prediction type (a name of ``PREDICTIONS``) of a scheduler's config.

    ``config``: as it is written; ``filled``: with the defaults of its class for what is not. ``notes``: those, and
    where it lies if not with the network, a line each.
    """

    schedule: NoiseSchedule
    prediction: str
    config: Mapping[str, Any]
    filled: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_config(folder: Path, kinds: Collection[str]) -> dict[str, Any]:
    """``config.json`` of the network in ``folder``; ``ModelError`` where there is none of a class in ``kinds``."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(_missing(folder, path.name))
    config = read_json(path)
    if config.get("_class_name") not in kinds:
        raise ModelError(f"{path}: describes a {config.get('_class_name')}; only {' or '.join(kinds)} is supported")
    if config.get("quantization_config"):
        raise ModelError(f"{path}: has a quantization_config; {PLAIN}")
    return config


def load_part(folder: Path, kind: str, config: Mapping[str, Any], precision: str | None = None) -> Part:
    """The network in ``folder``, of diffusers' class ``kind`` and with its weights.

    ``precision``: keep the weights in it (``denoiser.store_reduced``); None: float32. Nothing is downloaded.
    ``ModelError`` where weights are missing or broken or do not fit the config.
    """
    path = folder / "config.json"
    files = find_weights(folder)
    network = _build(kind, config, path)
    notes: list[str] = []
    fill(network, read_weights(files, notes), files[0], path.name)
    if precision is not None:
        for child in list(network.children())[1:]:  # the first one, which is small, tells diffusers the dtype
            store_reduced(child, precision)
    notes += network_notes(folder, config, network, files)
    return Part(network.eval().requires_grad_(False), config, files, tuple(notes))


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


def read_weights(files: Sequence[Path], notes: list[str] | None = None) -> dict[str, Tensor]:
    """All tensors of safetensors or ``torch.save`` files by name. ``ModelError`` where one is damaged or holds code.

    ``notes``: takes a line where a file of a training run holds more than is used.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors":
            weights |= read_checkpoint(file, notes)
            continue
        with open_safetensors(file) as stored:
            weights |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return weights


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """The opened file; what is wrong with it is a ``ModelError``, then and while it is read."""
    from safetensors import SafetensorError, safe_open

    check_content(file, ModelError)
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: is damaged or cut short ({first_line(error)}); copy it anew") from error


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
        raise ModelError(f"{path}: {reason} ({type(error).__name__}); copy it anew") from error
    if not isinstance(stored, dict):
        raise ModelError(f"{path}: holds a {type(stored).__name__}, not tensors by name; save the state dict alone")
    weights = _unprefixed(stored if _is_state_dict(stored) else _trained(stored, path, notes))
    if empty := next((name for name, tensor in weights.items() if tensor.is_meta), None):
        raise ModelError(f"{path}: holds the shape of {empty} and no numbers (a meta tensor); save the model anew")
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
    """Give ``network`` exactly the weights that are ``stored`` (``tensors.weights_of``), in its own dtypes.

    ``ModelError`` that names the first weight that does not fit, and ``file`` and ``config``.
    """
    wanted = network.state_dict()
    weights = weights_of(stored, file, wanted)
    given = {key if key in wanted else _modern(key): value for key, value in weights.items()}
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
    check_numbers(given, (key for key, tensor in wanted.items() if tensor.is_floating_point()), file)
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


def network_notes(
    folder: Path, config: Mapping[str, Any], network: nn.Module, files: Sequence[Path]
) -> tuple[str, ...]:
    """What the ``config`` of a network does not say and no weight shows, and other weights beside its ``files``."""
    full: Any = network.config
    absent = [key for key in INVISIBLE if key in full and key not in config and not is_settled(key, config)]
    notes = [assumed(folder / "config.json", {key: full[key] for key in absent})] if absent else []
    used = _variant(files[0].name)
    others = sorted(path.name for path in folder.iterdir() if (_variant(path.name) or used) not in (used, *ROUNDED))
    if others:
        notes.append(f"{folder}: {files[0].name} is used, not {', '.join(others)} beside it")
    return tuple(notes)


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


def assumed(path: Path, values: Mapping[str, Any]) -> str:
    """One line for defaults that stand in for what the file at ``path`` does not say."""
    told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    return f"{path} does not say all; assumed is the default of its class: {told}"


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


def load_scheduler(folder: Path, told: Mapping[str, Any] | None = None) -> Scheduler:
    """The scheduler in, beneath or beside ``folder``.

    ``told``: what the weights' own file says, by the same names. ``ModelError`` where there is none of a known kind, or
    it contradicts ``told``.
    """
    parents = Path(os.path.abspath(folder)).parents[:2]
    near = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER]
    places = [*near, *(parent / "scheduler" / SCHEDULER for parent in parents)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ModelError(
            f"{folder}: no noise schedule; looked for {SCHEDULER} and scheduler/{SCHEDULER}, there and in "
            "../scheduler. Save the scheduler the model was trained with there (scheduler.save_pretrained)"
        )
    config = read_json(path)
    for key, value in (told or {}).items():
        if config.get(key) not in (None, value):
            raise ModelError(
                f"{path}: {key} is {json.dumps(config[key])}, but the checkpoint's own is {json.dumps(value)}; "
                "correct the config, or give another model.config"
            )
    config = {**config, **(told or {})}
    absent = _absent(config, path)
    filled = {**config, **absent}
    notes = [] if path in near else [f"{folder} has no noise schedule of its own; that of {path} is used"]
    unsaid = {key: value for key, value in absent.items() if not is_settled(key, config)}
    notes += [assumed(path, unsaid)] if unsaid else []
    return Scheduler(_noise_schedule(filled, path), _prediction(filled, path), config, filled, tuple(notes))


def _absent(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the scheduler's config in ``path`` should say and does not, or says is null, with its class's defaults."""
    import diffusers

    name = config.get("_class_name") or "DDPMScheduler"
    if not isinstance(name, str):
        raise ModelError(f"{path}: _class_name is {json.dumps(name)}; give the name of the scheduler's class")
    kind = getattr(diffusers, name, None)
    known = inspect.signature((kind if inspect.isclass(kind) else diffusers.DDPMScheduler).__init__).parameters
    if "FlowMatch" in name:
        dynamic = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        facts = ["num_train_timesteps", *(dynamic if config.get("use_dynamic_shifting") else ("shift",))]
    else:
        facts = ["prediction_type"]
        if config.get("prediction_type") in ("v_prediction", "sample"):
            facts.append("rescale_betas_zero_snr")
        if config.get("trained_betas") is None and {"beta_schedule", "trained_betas"} & config.keys():
            ends = () if config.get("beta_schedule") == "squaredcos_cap_v2" else ("beta_start", "beta_end")
            facts += ["num_train_timesteps", "beta_schedule", *ends]
    defaults = {key: known[key].default for key in facts if key in known}
    if not config.get("_class_name"):
        defaults["_class_name"] = name
    return {key: default for key, default in defaults.items() if config.get(key) is None and default is not None}


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
