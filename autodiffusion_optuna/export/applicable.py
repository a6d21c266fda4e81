"""What ``apply`` takes besides a result: its JSON, a study, or a plain list of timesteps. Torch-free."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

from autodiffusion_optuna.errors import ConfigError, choose_from, program
from autodiffusion_optuna.export.recipes import NO_RAMP, RECIPES
from autodiffusion_optuna.export.result import ModelPart, NoisePart, Result
from autodiffusion_optuna.noise import from_scheduler_config

OWN_SOLVERS: dict[str, Callable[[Any], str | None]] = {
    "DDIMScheduler": lambda config: "ddim",
    "DEISMultistepScheduler": lambda config: f"deis_{config.solver_order}",
    "LMSDiscreteScheduler": lambda config: "lms",
    "UniPCMultistepScheduler": lambda config: f"unipc_{config.solver_order}" if config.predict_x0 else None,
}
"""Schedulers of diffusers that take no list, and the solver of the search that takes the same steps on one."""


class Listed(Result):
    """A plain list of timesteps on a pipeline: a result that nobody has scored.

    ``solver``: empty where the pipeline's own scheduler takes it.
    """

    def __str__(self) -> str:
        """As messages name it."""
        return "the list of timesteps"


def read_applicable(given: Any, solver: str | None = None) -> Result | list[Any]:
    """A result, or a list of timesteps that is yet to be checked (ConfigError)."""
    given = getattr(given, "best_schedule", given)  # of a study
    if isinstance(given, (str, Path)):
        given = Result.read(given)
    elif isinstance(given, Mapping):
        given = Result.parse(json.dumps(dict(given)), "dict")
    if isinstance(given, Result):
        if solver not in (None, given.solver):
            raise ConfigError(f"{given} has solver {given.solver}, solver={solver!r} was given; leave solver out")
        return given
    if hasattr(given, "tolist"):
        given = given.tolist()
    if not isinstance(given, Iterable):
        raise ConfigError(
            f"a {type(given).__name__} was given; give a Result, the path of its JSON, a study or a list of timesteps"
        )
    return list(given)


def read_timesteps(given: Iterable[Any], T: int) -> tuple[int, ...]:
    """Timesteps from noise to image; ascending ones are turned round.

    ``ConfigError`` where one is no integer in [0, T - 1] or occurs twice, or they are in no order.
    """
    values = list(given)
    if not all(isinstance(value, Integral) and not isinstance(value, bool) for value in values):
        raise ConfigError(f"timesteps {_shown(values)} are not all integers; give those that {program()} show prints")
    found = tuple(map(int, values))
    if not found:
        raise ConfigError("an empty list of timesteps was given; give at least one")
    if not all(0 <= t < T for t in found):
        raise ConfigError(f"timesteps {_shown(found)} are not all in [0, {T - 1}], the timesteps of this model")
    found = found if found[0] >= found[-1] else found[::-1]
    for before, after in pairwise(found):
        if before == after:
            raise ConfigError(f"timesteps {_shown(found)} have {before} twice; give each once")
        if before < after:
            raise ConfigError(f"timesteps {_shown(found)} neither descend nor ascend; sort them")
    return found


def _shown(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    return f"[{', '.join(shown[:12])}{', …' if len(shown) > 12 else ''}]"


def read_listed(pipe: object, scheduler: Any, given: Iterable[Any], solver: str | None) -> Listed:
    """A list of timesteps for a pipeline whose scheduler is ``scheduler``, by a solver of the search or by its own.

    ``ConfigError`` where they do not fit, or its own scheduler takes no list.
    """
    if not hasattr(scheduler, "config"):
        raise ConfigError(f"{type(pipe).__name__} has no scheduler; apply timesteps to a diffusers pipeline")
    config, kind = {**scheduler.config, "_class_name": type(scheduler).__name__}, type(scheduler).__name__
    timesteps = read_timesteps(given, int(config.get("num_train_timesteps", 1000)))
    if solver is None and _takes_lists(scheduler, config):
        return Listed.model_construct(timesteps=timesteps, solver="", guidance=None)
    own = OWN_SOLVERS.get(kind, lambda config: None)(scheduler.config) if solver is None else solver
    if own is None:
        raise ConfigError(
            f"diffusers' {kind} takes no list of timesteps; name one of the search's solvers, such as "
            f"solver='dpmpp_2m'. Known: {', '.join(sorted(RECIPES))}"
        )
    if own not in RECIPES:
        raise ConfigError(choose_from("solver", own, RECIPES))
    if config.get("use_dynamic_shifting"):
        raise ConfigError(
            f"the noise of this pipeline depends on the size of its images, so solver={solver!r} cannot take a list; "
            "leave solver out, or apply a result"
        )
    return _listed(pipe, config, timesteps, own, whose=solver)


def _takes_lists(scheduler: Any, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler takes any list; DDIM, for example, goes by its spacing, and others know no list of a flow."""
    strange = config.get("prediction_type") == "flow_prediction" and "FlowMatch" not in config["_class_name"]
    return "timesteps" in inspect.signature(scheduler.set_timesteps).parameters and not strange


def _listed(pipe: object, config: Mapping[str, Any], timesteps: tuple[int, ...], solver: str, whose: Any) -> Listed:
    """``config``: of the scheduler. ``whose``: None for the scheduler's own conventions, else the search's."""
    network: Any = getattr(pipe, "unet", None)
    network = getattr(pipe, "transformer", None) if network is None else network
    latent = any(getattr(pipe, name, None) is not None for name in ("vae", "vqvae"))
    flow = "FlowMatch" in config["_class_name"]
    ends_above = not config.get("set_alpha_to_one", True) or config.get("final_sigmas_type") == "sigma_min"
    final = "sigma_min" if whose is None and ends_above else "zero"
    clips = config.get("clip_sample", False)
    if whose is None and (config.get("thresholding") or (clips and config.get("clip_sample_range", 1.0) != 1.0)):
        raise ConfigError(
            f"{config['_class_name']} of this pipeline clips otherwise than to [-1, 1], which no solver here does on a "
            "list; name one with solver="
        )
    noise, side = from_scheduler_config(config), getattr(network, "config", {}).get("sample_size") or 1
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    shape = (getattr(network, "config", {}).get("in_channels", 1), *sides)
    model = ModelPart.model_construct(
        kind=type(pipe).__name__,
        prediction=config.get("prediction_type") or ("flow_prediction" if flow else "epsilon"),
        clip=clips if whose is None else not latent,
        shape=shape,
        latent_scale=None,
        weights=None,
        units=(),
    )
    return Listed.model_construct(
        model=model,
        train_timesteps=noise.T,
        solver=solver,
        final=final,
        eta=0.0,
        amplification_cap=None,
        guidance=None,
        timesteps=timesteps,
        skips=((),) * len(timesteps),
        reuses=((),) * len(timesteps),
        noise=NoisePart.of(noise, timesteps, final),  # type: ignore[arg-type]
    )


def own_scheduler(before: Any, listed: Listed, on_begin: Callable[[int | None, Any, Any], None]) -> Any:
    """A scheduler like ``before`` whose every run takes the list. ``on_begin``: told what a call asks for."""
    plain = {name: value for name, value in NO_RAMP.items() if name in before.config}
    scheduler = type(before).from_config(before.config, **plain)
    plain_set = scheduler.set_timesteps
    T, flow = before.config.num_train_timesteps, "FlowMatch" in type(before).__name__
    # A flow's scheduler shifts the levels it is given, by the size of the images where its config says so.
    levels = [(t + 1) / (T + 1) for t in listed.timesteps]
    own = {"sigmas": levels} if flow else {"timesteps": list(listed.timesteps)}

    @functools.wraps(plain_set)  # pipelines look at its signature
    def set_timesteps(num_inference_steps: int | None = None, device: Any = None, **asked: Any) -> None:
        on_begin(num_inference_steps, asked.get("timesteps"), asked.get("sigmas"))
        shifted = {"mu": asked["mu"]} if asked.get("mu") is not None else {}
        plain_set(device=device, **own, **shifted)

    scheduler.set_timesteps = set_timesteps
    return scheduler
