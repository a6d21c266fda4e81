"""A result inside an unmodified diffusers pipeline: its scheduler, its timesteps and the layers it skips.

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
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from autodiffusion_optuna.errors import ConfigError, program
from autodiffusion_optuna.export.applicable import Listed, own_scheduler, read_applicable, read_listed
from autodiffusion_optuna.export.check import LIMIT, same_weights, steps_error
from autodiffusion_optuna.export.recipes import NOT_PIPELINES, SCALING, TEXT_PIPELINES, Recipe, find_recipe
from autodiffusion_optuna.export.result import Result
from autodiffusion_optuna.noise import from_scheduler_config

if TYPE_CHECKING:
    import torch
    from torch import nn

Pipeline = TypeVar("Pipeline")
Forward = Callable[..., Any]

APPLIED = "_adopt_applied"
"""Attribute of a pipeline that keeps what ``remove`` needs."""

NETWORKS = ("unet", "transformer")
WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "PeftModel": "base_model",
    "LoraModel": "model",
}
"""Class of what may be put around a network -> where the network is in it."""


@dataclass(frozen=True, eq=False)
class _Applied:
    """What ``remove`` takes back."""

    before: Any
    scheduler: Any
    forwards: list[tuple[nn.Module, Forward | None]]


def apply(
    pipe: Pipeline, result: Any, *, solver: str | None = None, masks: bool = True, check: bool = True
) -> Pipeline:
    """Make a diffusers pipeline sample by a result or a list of timesteps, and return it.

    ``pipe``: a pipeline of the result's kind, or of the same architecture. ``result``: a ``Result``, the path of its
    JSON, that JSON as a dict, a study that ``load_study`` or ``search`` returned, or a plain list of timesteps, from
    noise to image or the other way round. A list is taken by the pipeline's own scheduler, or by ``solver``, one of
    the search's, as in a study. The scheduler becomes one that takes these steps, however many steps or which
    timesteps a call asks for. ``masks``: also skip and reuse the layers that the result does; False takes its timesteps
    alone.
    ``check``: compare the scheduler's steps with those of the search's sampler, on small states and formulas in the
    network's place, which takes milliseconds and no prompt. Nothing waits for the device between steps. The guidance
    scale stays an argument of the pipeline: pass ``result.guidance``. A call that asks for other steps or another scale
    is answered with a warning, once. Networks may be compiled: which layers run is asked outside of the graphs.
    Where its weights, latent scale or size are not those that the result was found with, a warning says so.
    Applying another result takes the place of the first; ``remove`` restores the pipeline.

    >>> pipe = apply(StableDiffusionPipeline.from_pretrained(FOLDER), "best.json")  # doctest: +SKIP
    >>> pipe("a photograph of a cat", num_inference_steps=6).images  # doctest: +SKIP
    >>> pipe = apply(pipe, [930, 741, 512, 330, 150, 20], solver="dpmpp_2m")  # doctest: +SKIP

    ``ConfigError`` where the pipeline is of another kind, has another noise schedule or lacks a layer, or where
    diffusers has no scheduler for the solver or ``check`` fails; the pipeline is then as it was.
    """
    before, applied = _part(pipe, "scheduler"), getattr(pipe, APPLIED, None)
    if applied and applied.scheduler is before:
        before = applied.before
    found = read_applicable(result, solver)
    if not isinstance(found, Result):
        listed = read_listed(pipe, before, found, solver)
        if not listed.solver:
            return _apply_listed(pipe, before, listed)
        found = listed
    result = found
    network = _network(pipe, result)
    _check_noise(before, result)
    recipe, run = find_recipe(result), _Run(weakref.ref(pipe), result)
    layers = _layers(network, result, run) if masks and result.masked else []
    run.layers = [layer for _, layer in layers]
    native = not recipe.scales or type(pipe).__name__ in SCALING
    if check:
        _check_steps(before, recipe, result, native, network)
    run.scheduler = _configured(before, recipe, run, native)
    if other := _other_model(pipe, network, result):
        warnings.warn(f"the pipeline is not of the model that {result} was found on: {other}", stacklevel=2)
    remove(pipe)
    if layers and _is_compiled(_part(pipe, *NETWORKS), network):
        from autodiffusion_optuna.evaluation.units import allow_graphs

        allow_graphs(len(layers))
    forwards = [(module, vars(module).get("forward")) for module, _ in layers]
    for module, layer in layers:
        layer.forward = module.forward
        module.forward = _outside(layer)
    pipe.scheduler = run.scheduler  # type: ignore[attr-defined]
    setattr(pipe, APPLIED, _Applied(before, run.scheduler, forwards))
    return pipe


def _apply_listed(pipe: Pipeline, before: Any, listed: Listed) -> Pipeline:
    """Have a pipeline's own kind of scheduler take a list of timesteps."""
    run = _Run(weakref.ref(pipe), listed)
    run.scheduler = own_scheduler(before, listed, run.begin)
    remove(pipe)
    setattr(pipe, APPLIED, _Applied(before, run.scheduler, []))
    pipe.scheduler = run.scheduler  # type: ignore[attr-defined]
    return pipe


def remove(pipe: Pipeline) -> Pipeline:
    """Undo ``apply``: the scheduler that the pipeline had, and every layer. Without effect on other pipelines."""
    applied: _Applied | None = getattr(pipe, APPLIED, None)
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


def is_applied(pipe: object) -> bool:
    """Whether a result or a list of timesteps is applied to a pipeline."""
    return getattr(pipe, APPLIED, None) is not None


# What the pipeline is


def _part(pipe: object, *names: str) -> Any:
    """The first of those parts that the pipeline has, None for none. What wraps one may be false, or no bool."""
    return next((part for name in names if (part := getattr(pipe, name, None)) is not None), None)


def _network(pipe: object, result: Result) -> Any:
    """The denoising network of a pipeline of the result's kind (ConfigError)."""
    kind, names = result.model.kind, [base.__name__ for base in type(pipe).__mro__]
    if kind in NOT_PIPELINES:
        raise ConfigError(
            f"{result} is of a model ({kind}) that is no diffusers pipeline; draw images with {program()} "
            "sample --result FILE"
        )
    network = _part(pipe, *NETWORKS)
    while type(network).__name__ in WRAPPERS:
        network = getattr(network, WRAPPERS[type(network).__name__])
    if network is None or not hasattr(_part(pipe, "scheduler"), "config"):
        raise ConfigError(f"{names[0]} has no network and scheduler; apply a result to a diffusers pipeline")
    # All pipelines of a UNet2DModel are the same loop.
    other_network = kind in ("DiTPipeline", *TEXT_PIPELINES) or type(network).__name__ != "UNet2DModel"
    if kind not in names and other_network:
        raise ConfigError(f"{result} is for a {kind}, not for a {names[0]}")
    return network


def _is_compiled(*networks: Any) -> bool:
    """Whether torch.compile runs one of them, around it, in place or as its forward."""
    marks = ("_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable")
    parts = [part for network in networks for part in (network, getattr(network, "forward", None))]
    return any(getattr(part, mark, None) is not None for part in parts for mark in marks)


def _check_noise(scheduler: Any, result: Result) -> None:
    """ConfigError where a pipeline's scheduler says that its network knows other noise, or predicts something else."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    flow = "FlowMatch" in config["_class_name"]
    prediction = config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")
    if result.model.prediction not in (None, prediction):
        raise ConfigError(
            f"{result} is for a network that predicts {result.model.prediction}, the pipeline's scheduler says "
            f"{prediction}; apply it to a pipeline of the same model"
        )
    levels = from_scheduler_config(config)
    same = result.train_timesteps == levels.T
    if same and prediction != "flow_prediction":  # a flow's levels are the sampler's choice
        alpha = [levels.alpha(t) for t in result.timesteps]
        same = np.allclose(alpha, result.noise.alpha[:-1], rtol=1e-5)
    if not same:
        raise ConfigError(
            f"{result} is for another noise schedule than the pipeline's scheduler has; apply it to a pipeline of the "
            "same model, or search for this one"
        )


def _other_model(pipe: object, network: Any, result: Result) -> str:
    """What sets a pipeline apart from the model of a result, as far as both say it; empty where nothing does."""
    from autodiffusion_optuna.evaluation.denoiser import weights_of

    part, found = result.model, []
    offloaded = part.weights is not None and any(weight.is_meta for weight in network.parameters())
    if part.weights and not offloaded and not same_weights(part.weights, weights_of(network, part.weights)):
        found.append("other weights, or adapters to them")
    config = getattr(_part(pipe, "vae", "vqvae"), "config", {})
    scale = None if config.get("latents_std") is not None else config.get("scaling_factor")  # of all channels together
    if scale is not None and part.latent_scale is not None and not math.isclose(scale, part.latent_scale, rel_tol=1e-5):
        found.append(f"latent scale {scale:g} instead of {part.latent_scale:g}")
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if size and part.kind not in TEXT_PIPELINES and (*np.broadcast_to(size, 2),) != part.shape[1:]:
        found.append(f"sample_size {size} instead of {part.shape[1]}x{part.shape[2]}")
    return ", ".join(found)


# Its layers


def _layers(network: Any, result: Result, run: _Run) -> list[tuple[nn.Module, _Layer]]:
    """Each module that does not always run, and what is to stand in for its ``forward`` (ConfigError)."""
    from autodiffusion_optuna.evaluation.solvers import query_steps
    from autodiffusion_optuna.evaluation.units import find_shortcut, sources

    visits = query_steps(result.solver, len(result.timesteps), result.final)
    # A part compiled by itself is wrapped, and comes before what it wraps.
    modules = {name.replace("_orig_mod.", "").removesuffix("._orig_mod"): m for name, m in network.named_modules()}
    found = []
    for name in dict.fromkeys(name for names in result.skips + result.reuses for name in names):
        module = modules.get(name)
        shortcut = find_shortcut(module)
        if module is None or shortcut is None:
            raise ConfigError(
                f"{result} skips or reuses {name!r}, and the pipeline's {type(network).__name__} has no such layer; "
                "apply it to the same model, or with masks=False"
            )
        skipped = frozenset(i for i, step in enumerate(visits) if name in result.skips[step])
        found.append((module, _Layer(shortcut, run, skipped, sources(result.modes_of(name), visits))))
    return found


@dataclass(eq=False)
class _Layer:
    """Stands in for a module's ``forward``.

    ``skipped``: network evaluations in which it is. ``sources``: those in which it reuses its branch, and of each the
    one that gave it. ``kept``: branches by evaluation, one for each call in it: a loop may call the network once for
    each half of the guidance.
    """

    shortcut: Forward
    run: _Run
    skipped: frozenset[int]
    sources: dict[int, int]
    forward: Forward | None = None
    kept: dict[int, list[Any]] = field(default_factory=dict)
    now: tuple[int, int] = (0, -1)
    calls: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from autodiffusion_optuna.evaluation.units import added_branch, branch_of

        now = self.run.now()
        if now != self.now:
            self.now, self.calls = now, 0
            wanted = {source for reused, source in self.sources.items() if reused >= now[1]}
            self.kept = {source: kept for source, kept in self.kept.items() if source in wanted and source < now[1]}
        evaluation, call = now[1], self.calls
        self.calls += 1
        if evaluation in self.skipped:
            return self.shortcut(*args, **kwargs)
        if evaluation in self.sources:
            return added_branch(self.shortcut(*args, **kwargs), self.kept[self.sources[evaluation]][call])
        assert self.forward is not None
        output = self.forward(*args, **kwargs)
        if evaluation in self.sources.values():
            self.kept.setdefault(evaluation, []).append(branch_of(output, self.shortcut(*args, **kwargs)))
        return output


def _outside(layer: _Layer) -> Forward:
    """The layer's call, outside of what torch.compile makes of the network: that would be compiled for every mask."""
    from torch.compiler import disable

    outside: Forward = disable(layer.__call__, recursive=False)  # type: ignore[no-untyped-call]
    return outside


@dataclass
class _Run:
    """An applied pipeline's present run."""

    pipe: Callable[[], Any]
    result: Result
    scheduler: Any = None
    begun: int = 0  # runs
    evaluation: int = -1  # network evaluations finished in it; -1 outside of one
    layers: list[_Layer] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    def begin(self, steps: int | None, timesteps: Any, sigmas: Any) -> None:
        """A call asks for steps, or lists of its own (None where it does not), all of which the result replaces."""
        self.begun, self.evaluation = self.begun + 1, 0
        own = self.result.timesteps
        asked = len(sigmas) if steps is None and sigmas is not None else steps
        if timesteps is not None and tuple(timesteps) != own:
            self.warn_ignored("timesteps", _short(timesteps), f"timesteps={list(own)}")
        elif sigmas is not None and not _is_even(sigmas):
            self.warn_ignored("sigmas", _short(sigmas), f"num_inference_steps={len(own)}")
        elif asked not in (None, len(own)):
            given = f"{asked} (given, or the pipeline's default)"
            self.warn_ignored("num_inference_steps", given, f"num_inference_steps={len(own)}")
        scale, wanted = getattr(self.pipe(), "_guidance_scale", None), self.result.guidance
        if wanted is not None and scale is not None and not math.isclose(scale, wanted):
            found = f"guidance_scale={scale:g} is not the one that {self.result} was found with"
            self.warn("guidance", f"{found}; pass guidance_scale={wanted:g}")

    def let_go(self) -> None:
        """Keep no branches: the run has ended."""
        for layer in self.layers:
            layer.kept = {}

    def warn_ignored(self, name: str, given: str, right: str) -> None:
        self.warn(
            name,
            f"{name}={given} has no effect: {self.result} is applied, which takes its own "
            f"{len(self.result.timesteps)} steps; pass {right}, or undo it with autodiffusion_optuna.remove(pipe)",
        )

    def warn(self, what: str, message: str) -> None:
        """A Python warning, the first time that it is due."""
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(message, stacklevel=2)

    def now(self) -> tuple[int, int]:
        """Which run this is, and its present network evaluation; -1 where its layers are to run."""
        pipe = self.pipe()
        if pipe is not None and _part(pipe, "scheduler") is not self.scheduler:
            self.warn(
                "scheduler",
                f"the pipeline's scheduler was replaced after {self.result} was applied, so all layers run; "
                "apply the result again, or undo it with autodiffusion_optuna.remove(pipe)",
            )
            return self.begun, -1
        return self.begun, self.evaluation


def _is_even(sigmas: Any) -> bool:
    """Whether sigmas are those that a pipeline of flows makes of a number of steps."""
    return len(sigmas) > 0 and np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas)))


def _short(values: Any) -> str:
    shown = ", ".join(f"{float(value):g}" for value in list(values)[:4])
    return f"[{shown}{', …' if len(values) > 4 else ''}]"


# Its scheduler


def step_dtype(device: Any) -> torch.dtype:
    """What a scheduler's steps between levels far apart are computed in: float64, where the device has it."""
    import torch

    return torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64


def _configured(before: Any, recipe: Recipe, run: _Run, native: bool) -> Any:
    """The scheduler of a recipe. ``native``: its states are the pipeline's; else they are x / alpha, and x outside."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, recipe.scheduler).from_config(before.config, **recipe.options)
    plain_set, plain_step = scheduler.set_timesteps, scheduler.step
    known = inspect.signature(plain_step).parameters
    gains = [1.0] * len(recipe.sigmas) if native else [math.hypot(1, sigma) for sigma in recipe.sigmas]

    @functools.wraps(plain_set)  # pipelines look at its signature
    def set_timesteps(num_inference_steps: int | None = None, device: Any = None, **asked: Any) -> None:
        run.begin(num_inference_steps, asked.get("timesteps"), asked.get("sigmas"))
        plain_set(recipe.steps, device=device)
        scheduler.timesteps = torch.tensor(recipe.timesteps, device=device)
        scheduler.sigmas = torch.tensor(recipe.sigmas, dtype=step_dtype(device) if recipe.scales else torch.float32)
        scheduler.set_begin_index(0)  # else the first step looks its own time up, and waits for the device

    @functools.wraps(plain_step)
    def step(model_output: Any, timestep: object, sample: Any, *args: object, **kwargs: object) -> Any:
        here = run.evaluation
        run.evaluation += 1
        if run.evaluation == len(scheduler.timesteps):
            run.let_go()
        if recipe.euler_last and here == recipe.steps - 1:
            scheduler.lower_order_nums = 0
        output = model_output[:, : sample.shape[1]]  # without a learned variance
        taken = {name: value for name, value in kwargs.items() if name in known}
        if kwargs.get("eta") not in (None, 0, run.result.eta):
            run.warn_ignored("eta", str(kwargs["eta"]), f"eta={run.result.eta:g}")
        if not recipe.scales:
            return plain_step(output, timestep, sample, *args, **taken)
        wide = step_dtype(sample.device)
        stepped = plain_step(output.to(wide), timestep, sample.to(wide) * gains[here], *args, **taken)
        if isinstance(stepped, tuple):
            return ((stepped[0] / gains[here + 1]).to(sample.dtype), *stepped[1:])
        stepped.prev_sample = (stepped.prev_sample / gains[here + 1]).to(sample.dtype)
        return stepped

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    if not native:
        scheduler.scale_model_input = lambda sample, timestep=None: sample
        scheduler.is_scale_input_called = True
    return scheduler


def _check_steps(before: Any, recipe: Recipe, result: Result, native: bool, network: Any) -> None:
    """ConfigError where the scheduler differs from the search's sampler; a warning where only in low precision."""
    import torch

    def error(dtype: torch.dtype) -> float:
        scheduler = _configured(before, recipe, _Run(lambda: None, result), native)
        return steps_error(result, scheduler, recipe.scales and native, dtype)

    plain = error(torch.float32)
    differs = f"diffusers' {recipe.scheduler} differs from the sampler that {result} was found with"
    if not plain <= LIMIT:
        raise ConfigError(
            f"{differs} by {plain:.3g} of 255 on its timesteps; draw images with {program()} sample --result FILE, or "
            "apply it all the same with check=False"
        )
    dtype = getattr(network, "dtype", torch.float32)
    if dtype in (torch.float16, torch.bfloat16) and not (reduced := error(dtype)) <= LIMIT:
        warnings.warn(
            f"in {str(dtype).removeprefix('torch.')}, {differs} by {reduced:.3g} of 255 on its timesteps, in float32 "
            f"by {plain:.2g}",
            stacklevel=3,
        )
