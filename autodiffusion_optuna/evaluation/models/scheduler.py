"""The noise that a model was trained on, from the config of a scheduler as diffusers saves it."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from, first_line
from autodiffusion_optuna.evaluation.denoiser import PREDICTIONS
from autodiffusion_optuna.evaluation.models.parts import assumed, is_settled
from autodiffusion_optuna.files import read_json
from autodiffusion_optuna.noise import NoiseSchedule, from_scheduler_config

SCHEDULER = "scheduler_config.json"


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


def load_scheduler(folder: Path, trained: Mapping[str, Any] = MappingProxyType({})) -> Scheduler:
    """The scheduler in, beneath or beside ``folder``.

    ``trained``: what the weights' own file says, by the same names. ``ModelError`` where there is no scheduler of a
    known kind, or it contradicts ``trained``.
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
    for key, value in trained.items():
        if config.get(key) not in (None, value):
            raise ModelError(
                f"{path}: {key} is {json.dumps(config[key])}, but the checkpoint's own is {json.dumps(value)}; "
                "correct the config, or give another model.config"
            )
    notes = [] if path in near else [f"{folder} has no noise schedule of its own; that of {path} is used"]
    return read_scheduler({**config, **trained}, path, notes)


def read_scheduler(config: Mapping[str, Any], path: Path | str, notes: Sequence[str] = ()) -> Scheduler:
    """The noise of a scheduler's ``config``, which ``path`` stands for in messages (ModelError, as above)."""
    absent = _absent(config, path)
    filled = {**config, **absent}
    unsaid = {key: value for key, value in absent.items() if not is_settled(key, config)}
    said = [assumed(path, unsaid)] if unsaid else []
    return Scheduler(*_read(filled, path), config, filled, (*notes, *said))


def _read(config: Mapping[str, Any], path: Path | str) -> tuple[NoiseSchedule, str]:
    """The noise schedule and the prediction type that a whole ``config`` says."""
    kind = str(config.get("_class_name", ""))
    flow = "FlowMatch" in kind  # whose networks predict one kind, so its configs do not say
    if not flow and not {"beta_schedule", "trained_betas"} & config.keys():
        raise ModelError(f"{path}: {kind or 'this config'} has no betas; save a DDPM- or flow-matching scheduler")
    try:
        schedule = from_scheduler_config(config)
    except (ConfigError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from error
    prediction = str(config.get("prediction_type") or ("flow_prediction" if flow else "epsilon"))
    if prediction not in PREDICTIONS:
        raise ModelError(f"{path}: {choose_from('prediction_type', prediction, PREDICTIONS)}")
    return schedule, prediction


def _absent(config: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
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
