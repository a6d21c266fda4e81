"""A schedule inside an unmodified diffusers pipeline: its scheduler, its timesteps and the layers it skips.

Imports neither torch nor diffusers before ``apply`` is called.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.check import LIMIT, same_weights, steps_error
from autodiffusion_optuna.export.schedule import FORMAT, Result
from autodiffusion_optuna.noise import from_scheduler_config

if TYPE_CHECKING:
    import torch
    from torch import nn

Pipeline = TypeVar("Pipeline")
Number = int | float
Forward = Callable[..., Any]

NO_RAMP = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
"""Options by which a scheduler keeps the levels it is given; with any of them on it refuses or replaces them."""

NO_NOISE = 1e-8
"""Stands for sigma = 0 in schedulers that take its logarithm; far below what float32 can tell from it."""

TEXT_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
NOT_PIPELINES = ("adm", "plugin", "mixture")
SCALING = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LDMPipeline")
"""Pipelines that ask the scheduler to scale the first noise and the network's input, as some schedulers need."""


@dataclass(frozen=True)
class Recipe:
    """A diffusers scheduler that takes the steps of a schedule.

    ``scheduler``: its class. ``options``: for ``from_config``. ``steps``: for its own ``set_timesteps``, after which
    ``timesteps`` (model time of each network evaluation) and ``sigmas`` (levels, one more) are put in. ``argument``: of
    ``set_timesteps`` and of pipelines that gives the same; None where there is none. ``euler_last``: the last step has
    to be told to be of first order. ``scales``: its states are x / alpha, which the pipeline must scale; its steps are
    taken in float64, because a step from sigma / alpha = s to r multiplies what is rounded there by up to s / r.
    """

    scheduler: str
    options: dict[str, Any]
    steps: int
    timesteps: tuple[Number, ...]
    sigmas: tuple[float, ...]
    argument: Literal["timesteps", "sigmas"] | None = None
    euler_last: bool = False
    scales: bool = False


def find_recipe(schedule: Result) -> Recipe:
    """The diffusers scheduler for a schedule.

    ``ConfigError`` where there is none that takes its solver's steps on an uneven list, or none with its settings.
    """
    levels = _levels(schedule)
    if schedule.amplification_cap is not None:
        raise _no_scheduler(schedule, f"with an amplification cap of {schedule.amplification_cap:g}")
    if schedule.eta not in (0, 1) or (schedule.eta and schedule.solver != "ddim"):
        raise _no_scheduler(schedule, f"with eta = {schedule.eta:g}")
    writer = _RECIPES.get(schedule.solver)
    recipe = writer(schedule, levels) if writer else None
    if recipe is None:
        raise _no_scheduler(schedule, "on such a list")
    return recipe


def _no_scheduler(schedule: Result, how: str) -> ConfigError:
    return ConfigError(
        f"diffusers has no scheduler that takes the steps of {schedule.solver} {how}; draw images with adopt sample "
        "--schedule FILE, or with the script of adopt export --format python"
    )


@dataclass(frozen=True)
class _Levels:
    """What schedulers are told: K timesteps, K + 1 sigmas."""

    timesteps: tuple[Number, ...]
    sigmas: tuple[float, ...]
    flow: bool
    last: bool
    """Whether the last update ends without noise."""

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def positive(self) -> tuple[float, ...]:
        return tuple(max(sigma, NO_NOISE) for sigma in self.sigmas)


def _levels(schedule: Result) -> _Levels:
    noise = schedule.require_noise()
    last = schedule.final == "zero"
    if schedule.model.prediction == "flow_prediction":
        return _Levels(noise.model_times, noise.sigma, True, last)
    ratio = tuple(sigma / alpha for alpha, sigma in zip(noise.alpha, noise.sigma, strict=True))
    return _Levels(schedule.timesteps, ratio, False, last)


def _common(schedule: Result, levels: _Levels) -> dict[str, Any]:
    """Options of all schedulers of the DPM-Solver family, UniPC and DEIS, whatever the pipeline's own config says."""
    clip = {"dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0} if schedule.model.clip else {}
    flow = {"use_flow_sigmas": True, "flow_shift": 1.0, "use_dynamic_shifting": False} if levels.flow else {}
    return {
        **NO_RAMP,
        "thresholding": schedule.model.clip,  # with a ratio and maximum of 1: a plain clip to [-1, 1]
        **clip,
        **({"prediction_type": "flow_prediction"} if levels.flow else {}),
        **flow,
    }


def _multistep(order: int, by_noise: bool = False) -> Callable[[Result, _Levels], Recipe | None]:
    """DPM-Solver++, or DPM-Solver where it weighs the noise, which diffusers has not for flows."""

    def write(schedule: Result, levels: _Levels) -> Recipe | None:
        lower = not levels.last and levels.steps < 10  # the authors' rule; diffusers' own is below 15
        stuck = order == 3 and not lower and not levels.last and schedule.timesteps[-1] == 0  # NaN: a step of no length
        if (by_noise and levels.flow) or stuck:
            return None
        stochastic = "sde-" if schedule.eta else ""
        options = {
            "algorithm_type": "dpmsolver" if by_noise else f"{stochastic}dpmsolver++",
            "solver_type": "midpoint",
            "solver_order": order,  # order 1 is DDIM, exactly, on any list of timesteps
            "final_sigmas_type": "zero" if levels.last and not by_noise else "sigma_min",
            "lower_order_final": lower,
            "euler_at_final": by_noise and levels.last,
            "variance_type": None,
            "use_lu_lambdas": False,
            **_common(schedule, levels),
        }
        sigmas = levels.positive if by_noise else levels.sigmas
        listed = not levels.flow and sigmas == levels.sigmas
        return Recipe(
            "DPMSolverMultistepScheduler",
            options,
            levels.steps,
            levels.timesteps,
            sigmas,
            "timesteps" if listed else None,
        )

    return write


def _first_order(schedule: Result, levels: _Levels) -> Recipe | None:
    if not levels.flow or schedule.eta or schedule.model.clip:  # diffusers' scheduler of flows cannot clip
        return _multistep(1)(schedule, levels)
    options = {
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        "stochastic_sampling": False,
        **NO_RAMP,
    }
    return Recipe(
        "FlowMatchEulerDiscreteScheduler",
        options,
        levels.steps,
        levels.timesteps,
        levels.sigmas,
        "sigmas" if levels.last else None,
    )


def _singlestep(by_noise: bool) -> Callable[[Result, _Levels], Recipe | None]:
    def write(schedule: Result, levels: _Levels) -> Recipe | None:
        if by_noise and (levels.flow or schedule.model.clip):  # diffusers clips by the wrong levels there
            return None
        options = {
            "algorithm_type": "dpmsolver" if by_noise else "dpmsolver++",
            "solver_type": "midpoint",
            "solver_order": 2,
            "final_sigmas_type": "zero" if levels.last and not by_noise else "sigma_min",
            "lower_order_final": levels.last or levels.steps % 2 == 1,
            "variance_type": None,
            **_common(schedule, levels),
        }
        sigmas = levels.positive if by_noise else levels.sigmas
        listed = not levels.flow and sigmas == levels.sigmas
        return Recipe(
            "DPMSolverSinglestepScheduler",
            options,
            levels.steps,
            levels.timesteps,
            sigmas,
            "timesteps" if listed else None,
        )

    return write


def _unipc(order: int) -> Callable[[Result, _Levels], Recipe | None]:
    def write(schedule: Result, levels: _Levels) -> Recipe | None:
        options = {
            "solver_type": "bh2",
            "solver_order": order,
            "predict_x0": True,
            "lower_order_final": True,
            "disable_corrector": [],
            **_common(schedule, levels),
        }
        return Recipe("UniPCMultistepScheduler", options, levels.steps, levels.timesteps, levels.sigmas)

    return write


def _deis(order: int) -> Callable[[Result, _Levels], Recipe | None]:
    def write(schedule: Result, levels: _Levels) -> Recipe | None:
        options = {
            "algorithm_type": "deis",
            "solver_type": "logrho",
            "solver_order": order,
            "lower_order_final": not levels.last and levels.steps < 10,
            **_common(schedule, levels),
        }
        return Recipe(
            "DEISMultistepScheduler",
            options,
            levels.steps,
            levels.timesteps,
            levels.positive,
            euler_last=levels.last,
        )

    return write


def _lms(schedule: Result, levels: _Levels) -> Recipe | None:
    if levels.flow or schedule.model.clip:  # it has neither
        return None
    options = {"timestep_spacing": "leading", **NO_RAMP}
    return Recipe("LMSDiscreteScheduler", options, levels.steps, levels.timesteps, levels.sigmas, scales=True)


def _heun(schedule: Result, levels: _Levels) -> Recipe | None:
    """Every level but the first is visited twice, before and after its step is corrected."""
    if levels.flow:  # diffusers averages velocities there, over s and not over sigma / alpha
        return None
    first, *others = levels.timesteps
    start, *inner, final = levels.sigmas
    timesteps = (first, *(t for other in others for t in (other, other)))
    sigmas = (start, *(s for level in inner for s in (level, level)), final)
    options = {
        "timestep_spacing": "leading",  # scales the first noise by sqrt(1 + sigma^2)
        "clip_sample": schedule.model.clip,
        "clip_sample_range": 1.0,
        **NO_RAMP,
    }
    if not levels.last:  # above no noise the last step is corrected too, which diffusers' own list never is
        timesteps, sigmas = (*timesteps, 0), (*sigmas, final)
    # It takes a list of timesteps, but has betas of its own where the model's config leaves them out.
    return Recipe("HeunDiscreteScheduler", options, levels.steps, timesteps, sigmas, scales=True)


_RECIPES: dict[str, Callable[[Result, _Levels], Recipe | None]] = {
    "ddim": _first_order,
    "euler": _first_order,
    "heun": _heun,
    "lms": _lms,
    "dpm_solver_2": _multistep(2, by_noise=True),
    "dpm_solver_3": _multistep(3, by_noise=True),
    "dpm_solver_2s": _singlestep(by_noise=True),
    "dpmpp_2s": _singlestep(by_noise=False),
    "dpmpp_2m": _multistep(2),
    "dpmpp_3m": _multistep(3),
    "unipc_2": _unipc(2),
    "unipc_3": _unipc(3),
    "deis_2": _deis(2),
    "deis_3": _deis(3),
}
"""Solver -> recipe, or None where the scheduler lacks what the schedule needs."""


@dataclass
class _Run:
    """An applied pipeline's present run. ``evaluation``: network evaluations finished in it; -1 outside of one.

    ``told``: what the user was warned of, once each.
    """

    pipe: Callable[[], Any]
    schedule: Result
    scheduler: Any = None
    evaluation: int = -1
    told: set[str] = field(default_factory=set)

    def begin(self, steps: int | None, timesteps: Any, sigmas: Any) -> None:
        """A call asks for steps, or lists of its own (None where it does not), all of which the schedule replaces."""
        self.evaluation = 0
        own = self.schedule.timesteps
        if timesteps is not None and tuple(timesteps) != own:
            self.tell("timesteps", f"timesteps={_short(timesteps)}", f"timesteps={list(own)}")
        elif sigmas is not None and not _is_even(sigmas):
            self.tell("sigmas", f"sigmas={_short(sigmas)}", f"num_inference_steps={len(own)}")
        elif (asked := steps if steps is not None else _length(sigmas)) not in (None, len(own)):
            given = f"num_inference_steps={asked} (given, or the pipeline's default)"
            self.tell("steps", given, f"num_inference_steps={len(own)}")
        scale, wanted = getattr(self.pipe(), "_guidance_scale", None), self.schedule.guidance
        if wanted is not None and scale is not None and not math.isclose(scale, wanted):
            self.warn(
                "guidance",
                f"guidance_scale={scale:g} is not the one that the schedule of study {self.schedule.study!r} was found "
                f"with; pass guidance_scale={wanted:g}",
            )

    def tell(self, what: str, given: str, right: str) -> None:
        self.warn(
            what,
            f"{given} has no effect: the schedule of study {self.schedule.study!r} is applied, which takes its own "
            f"{len(self.schedule.timesteps)} steps; pass {right}, or undo it with autodiffusion_optuna.remove(pipe)",
        )

    def warn(self, what: str, message: str) -> None:
        """A Python warning, the first time that it is due."""
        if what not in self.told:
            self.told.add(what)
            warnings.warn(message, UserWarning, stacklevel=2)

    def skips(self, skipped: frozenset[int]) -> bool:
        """Whether a layer that is bypassed in the evaluations ``skipped`` is bypassed now."""
        pipe = self.pipe()
        if pipe is not None and _part(pipe, "scheduler") is not self.scheduler:
            self.warn(
                "scheduler",
                f"the pipeline's scheduler was replaced after the schedule of study {self.schedule.study!r} was "
                "applied, so no layer is skipped; apply the schedule again, or undo it with "
                "autodiffusion_optuna.remove(pipe)",
            )
            return False
        return self.evaluation in skipped


def _length(values: Any) -> int | None:
    return None if values is None else len(values)


def _is_even(sigmas: Any) -> bool:
    """Whether sigmas are those that a pipeline of flows makes of a number of steps."""
    return len(sigmas) > 0 and np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas)))


def _short(values: Any) -> str:
    shown = ", ".join(f"{float(value):g}" for value in list(values)[:4])
    return f"[{shown}{', …' if len(values) > 4 else ''}]"


def _bypass(forward: Forward, shortcut: Forward, skipped: frozenset[int], run: _Run) -> Forward:
    """Stands in for a module's ``forward``; bypasses it in the evaluations ``skipped``."""
    from torch.compiler import disable

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (shortcut if run.skips(skipped) else forward)(*args, **kwargs)

    # Asked outside of what torch.compile makes of the network: it would compile it anew for every mask.
    outside: Forward = disable(chosen, recursive=False)  # type: ignore[no-untyped-call]
    return outside


@dataclass(frozen=True, eq=False)
class _Applied:
    """What ``remove`` takes back."""

    before: Any
    scheduler: Any
    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)


APPLIED = "_adopt_applied"


def apply(pipe: Pipeline, schedule: str | Path | Result, *, masks: bool = True, check: bool = True) -> Pipeline:
    """Make a diffusers pipeline sample by a schedule, and return it.

    ``pipe``: a pipeline of the schedule's kind, or of the same architecture. ``schedule``: or the path of its JSON.
    Its scheduler becomes one that takes the schedule's steps, however many steps or which timesteps a call asks for.
    ``masks``: also skip the layers that the schedule skips; False takes its timesteps alone. ``check``: compare the
    scheduler's steps with those of the search's sampler, on small states and formulas in the network's place, which
    takes milliseconds and no prompt. Nothing waits for the device between steps. The guidance scale stays an argument
    of the pipeline: pass ``schedule.guidance``. A call that asks for other steps or another scale is answered with a
    warning, once. Networks may be compiled: which layers are skipped is asked outside of the graphs.
    Where its weights, latent scale or size are not those that the schedule was found with, it says so.
    Applying another schedule takes the place of the first; ``remove`` restores the pipeline.

    >>> pipe = apply(StableDiffusionPipeline.from_pretrained(FOLDER), "best.json")  # doctest: +SKIP
    >>> pipe("a photograph of a cat", num_inference_steps=6).images  # doctest: +SKIP

    ``ConfigError`` where the pipeline is of another kind, has another noise schedule or lacks a layer, or where
    diffusers has no scheduler for the solver or ``check`` fails; the pipeline is then as it was.
    """
    schedule = schedule if isinstance(schedule, Result) else Result.read(schedule)
    network = _network(pipe, schedule)
    applied = _applied(pipe)
    before = applied.before if applied and applied.scheduler is _part(pipe, "scheduler") else _part(pipe, "scheduler")
    _check_noise(before, schedule)
    recipe, run = find_recipe(schedule), _Run(weakref.ref(pipe), schedule)
    bypasses = _bypasses(network, schedule) if masks and schedule.masked else []
    native = not recipe.scales or type(pipe).__name__ in SCALING
    if check:
        _check_steps(before, recipe, schedule, native, network)
    run.scheduler = _configured(before, recipe, run, native)
    if other := _other_model(pipe, network, schedule):
        warnings.warn(
            f"the pipeline is not of the model that the schedule of study {schedule.study!r} was found on: {other}",
            UserWarning,
            stacklevel=2,
        )
    remove(pipe)
    if bypasses and _is_compiled(_outer(pipe), network):
        from autodiffusion_optuna.evaluation.skip import allow_graphs

        allow_graphs(len(bypasses))
    forwards = []
    for module, shortcut, skipped in bypasses:
        forwards.append((module, vars(module).get("forward")))
        module.forward = _bypass(module.forward, shortcut, skipped, run)
    pipe.scheduler = run.scheduler  # type: ignore[attr-defined]
    setattr(pipe, APPLIED, _Applied(before, run.scheduler, forwards))
    return pipe


def remove(pipe: Pipeline) -> Pipeline:
    """Undo ``apply``: the scheduler that the pipeline had, and every layer. Without effect on other pipelines."""
    applied = _applied(pipe)
    if applied is None:
        return pipe
    for module, forward in applied.forwards:
        if forward is None:
            del module.forward  # the class has its own
        else:
            module.forward = forward
    if _part(pipe, "scheduler") is applied.scheduler:  # a scheduler set since is the user's
        pipe.scheduler = applied.before  # type: ignore[attr-defined]
    delattr(pipe, APPLIED)
    return pipe


def _applied(pipe: object) -> _Applied | None:
    found = getattr(pipe, APPLIED, None)
    return found if isinstance(found, _Applied) else None


def _part(pipe: object, name: str) -> Any:
    return getattr(pipe, name, None)


def _outer(pipe: object) -> Any:
    """What the pipeline calls as its denoising network; None where it has none. A wrapper may be false, or no bool."""
    unet = _part(pipe, "unet")
    return _part(pipe, "transformer") if unet is None else unet


def _network(pipe: object, schedule: Result) -> Any:
    """The denoising network of a pipeline of the schedule's kind (ConfigError)."""
    kind, names = schedule.model.kind, [base.__name__ for base in type(pipe).__mro__]
    if kind in NOT_PIPELINES:
        raise ConfigError(
            f"the schedule of study {schedule.study!r} is of a model ({kind}) that is no diffusers pipeline; "
            "draw images with adopt sample --schedule FILE"
        )
    network = _unwrapped(_outer(pipe))
    if network is None or not hasattr(_part(pipe, "scheduler"), "config"):
        raise ConfigError(f"{names[0]} has no network and scheduler; apply a schedule to a diffusers pipeline")
    plain = type(network).__name__ == "UNet2DModel"  # all pipelines of one are the same loop
    if kind not in names and not (plain and _is_plain(kind)):
        raise ConfigError(f"the schedule of study {schedule.study!r} is for a {kind}, not for a {names[0]}")
    return network


WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "PeftModel": "base_model",
    "LoraModel": "model",
}
"""Class of what may be put around a network -> where the network is in it."""


def _unwrapped(network: Any) -> Any:
    while type(network).__name__ in WRAPPERS:
        network = getattr(network, WRAPPERS[type(network).__name__])
    return network


def _is_compiled(*networks: Any) -> bool:
    """Whether torch.compile runs one of them, around it, in place or as its forward."""
    marks = ("_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable")
    return any(
        getattr(part, mark, None) is not None
        for network in networks
        for part in (network, getattr(network, "forward", None))
        for mark in marks
    )


def _is_plain(kind: str) -> bool:
    """Whether models of that kind have a UNet2DModel."""
    return kind not in (*NOT_PIPELINES, "DiTPipeline", "FluxPipeline") and not kind.startswith("StableDiffusion")


def _check_noise(scheduler: Any, schedule: Result) -> None:
    """ConfigError where a pipeline's scheduler says that its network knows other noise, or predicts something else."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    flow = "FlowMatch" in config["_class_name"]
    prediction = config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")
    wanted = schedule.model.prediction
    if wanted is not None and prediction != wanted:
        raise ConfigError(
            f"the schedule of study {schedule.study!r} is for a network that predicts {wanted}, the pipeline's "
            f"scheduler says {prediction}; apply it to a pipeline of the same model"
        )
    levels = from_scheduler_config(config)
    alpha = schedule.require_noise().alpha[: len(schedule.timesteps)]
    same = schedule.train_timesteps == levels.T
    if same and prediction != "flow_prediction":  # a flow's levels are the sampler's choice
        same = np.allclose([levels.alpha(t) for t in schedule.timesteps], alpha, rtol=1e-5)
    if not same:
        raise ConfigError(
            f"the schedule of study {schedule.study!r} is for another noise schedule than the pipeline's scheduler "
            "has; apply it to a pipeline of the same model, or search for this one"
        )


def _other_model(pipe: object, network: Any, schedule: Result) -> str:
    """What sets a pipeline apart from the model of a schedule, as far as both say it; empty where nothing does."""
    from autodiffusion_optuna.evaluation.denoiser import weights_of

    part, found = schedule.model, []
    offloaded = part.weights is not None and any(weight.is_meta for weight in network.parameters())
    if part.weights and not offloaded and not same_weights(part.weights, weights_of(network, part.weights)):
        found.append("other weights, or adapters to them")
    scale = _latent_scale(pipe)
    if scale is not None and part.latent_scale is not None and not math.isclose(scale, part.latent_scale, rel_tol=1e-5):
        found.append(f"latent scale {scale:g} instead of {part.latent_scale:g}")
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if size and part.shape and part.kind not in TEXT_PIPELINES and (*np.broadcast_to(size, 2),) != part.shape[1:]:
        found.append(f"sample_size {size} instead of {part.shape[1]}x{part.shape[2]}")
    if schedule.format < FORMAT:
        found.append("not known, as the schedule is of an older version, which did not say its weights")
    return ", ".join(found)


def _latent_scale(pipe: object) -> float | None:
    """What a pipeline multiplies latents by; None where there are none, or each channel has a scale of its own."""
    decoder = _part(pipe, "vqvae") if _part(pipe, "vae") is None else _part(pipe, "vae")
    config = getattr(decoder, "config", {})
    return None if config.get("latents_std") is not None else config.get("scaling_factor")


def _bypasses(network: Any, schedule: Result) -> list[tuple[nn.Module, Callable[..., Any], frozenset[int]]]:
    """Each module that is ever skipped, what it then returns, and in which evaluations (ConfigError)."""
    from autodiffusion_optuna.evaluation.skip import RULES
    from autodiffusion_optuna.evaluation.solvers import query_steps

    visits = query_steps(schedule.solver, len(schedule.timesteps), schedule.final)
    # A part compiled by itself is wrapped, and comes before what it wraps.
    modules = {name.replace("_orig_mod.", "").removesuffix("._orig_mod"): m for name, m in network.named_modules()}
    found = []
    for name in dict.fromkeys(name for names in schedule.skips for name in names):
        module = modules.get(name)
        rule = RULES.get(type(module).__name__)
        shortcut = rule(module) if rule else None
        if module is None or shortcut is None:
            raise ConfigError(
                f"the schedule of study {schedule.study!r} skips {name!r}, and the pipeline's {type(network).__name__} "
                "has no such layer; apply it to the same model, or with masks=False"
            )
        skipped = frozenset(i for i, step in enumerate(visits) if name in schedule.skips[step])
        found.append((module, shortcut, skipped))
    return found


def _check_steps(before: Any, recipe: Recipe, schedule: Result, native: bool, network: Any) -> None:
    """ConfigError where the scheduler, built from ``before``, goes other ways than the search's sampler.

    A warning where it does so only in the precision of the pipeline's network, as states are kept in it.
    """
    import torch

    def error(dtype: torch.dtype) -> float:
        run = _Run(lambda: None, schedule)
        return steps_error(schedule, _configured(before, recipe, run, native), recipe.scales and native, dtype)

    plain = error(torch.float32)
    if not plain <= LIMIT:
        raise ConfigError(
            f"diffusers' {recipe.scheduler} differs from the sampler that the schedule of study {schedule.study!r} was "
            f"found with by {plain:.3g} of 255 on its timesteps; draw images with adopt sample --schedule FILE, or "
            "apply it all the same with check=False"
        )
    dtype = getattr(network, "dtype", torch.float32)
    if dtype in (torch.float16, torch.bfloat16) and not (reduced := error(dtype)) <= LIMIT:
        warnings.warn(
            f"in {str(dtype).removeprefix('torch.')}, diffusers' {recipe.scheduler} differs from the sampler that the "
            f"schedule of study {schedule.study!r} was found with by {reduced:.3g} of 255 on its timesteps, in "
            f"float32 by {plain:.2g}",
            UserWarning,
            stacklevel=3,
        )


def _wide(device: Any) -> torch.dtype:
    """float64, where the device has it."""
    import torch

    return torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64


def _configured(before: Any, recipe: Recipe, run: _Run, native: bool) -> Any:
    """The scheduler of a recipe. ``native``: its states are the pipeline's; else they are x / alpha, and x outside."""
    import diffusers
    import torch

    kind: Any = getattr(diffusers, recipe.scheduler)
    scheduler = kind.from_config(before.config, **recipe.options)
    plain_set, plain_step = scheduler.set_timesteps, scheduler.step
    known = inspect.signature(plain_step).parameters
    gains = [1.0] * len(recipe.sigmas) if native else [math.hypot(1, sigma) for sigma in recipe.sigmas]

    @functools.wraps(plain_set)  # pipelines look at its signature
    def set_timesteps(num_inference_steps: int | None = None, device: Any = None, **asked: Any) -> None:
        run.begin(num_inference_steps, asked.get("timesteps"), asked.get("sigmas"))
        plain_set(recipe.steps, device=device)
        scheduler.timesteps = torch.tensor(recipe.timesteps, device=device)
        scheduler.sigmas = torch.tensor(recipe.sigmas, dtype=_wide(device) if recipe.scales else torch.float32)
        scheduler.set_begin_index(0)  # else the first step looks its own time up, and waits for the device

    @functools.wraps(plain_step)
    def step(model_output: Any, timestep: object, sample: Any, *args: object, **kwargs: object) -> Any:
        here = run.evaluation
        run.evaluation += 1
        if recipe.euler_last and here == recipe.steps - 1:
            scheduler.lower_order_nums = 0
        output = model_output[:, : sample.shape[1]]  # without a learned variance
        taken = {name: value for name, value in kwargs.items() if name in known}
        if kwargs.get("eta") not in (None, 0, run.schedule.eta):
            run.tell("eta", f"eta={kwargs['eta']}", f"eta={run.schedule.eta:g}")
        if not recipe.scales:
            return plain_step(output, timestep, sample, *args, **taken)
        wide = _wide(sample.device)
        result = plain_step(output.to(wide), timestep, sample.to(wide) * gains[here], *args, **taken)
        if isinstance(result, tuple):
            return ((result[0] / gains[here + 1]).to(sample.dtype), *result[1:])
        result.prev_sample = (result.prev_sample / gains[here + 1]).to(sample.dtype)
        return result

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    if not native:
        scheduler.scale_model_input = lambda sample, timestep=None: sample
        scheduler.is_scale_input_called = True
    return scheduler
