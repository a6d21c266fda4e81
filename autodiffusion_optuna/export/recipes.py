"""Which scheduler of diffusers takes the steps of which solver, with which options. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from autodiffusion_optuna.errors import ConfigError, program
from autodiffusion_optuna.export.result import Result

Number = int | float

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
    """A diffusers scheduler that takes the steps of a result.

    ``scheduler``: its class. ``options``: for ``from_config``. ``steps``: for its own ``set_timesteps``, after which
    ``timesteps`` (model time of each network evaluation) and ``sigmas`` (levels, one more) are put in. ``argument``: of
    ``set_timesteps`` and of pipelines that gives the same; None where there is none. ``euler_last``: the last step has
    to be made first order. ``scales``: its states are x / alpha, which the pipeline must scale; its steps are taken in
    float64, because a step from sigma / alpha = s to r multiplies what is rounded there by up to s / r.
    """

    scheduler: str
    options: dict[str, Any]
    steps: int
    timesteps: tuple[Number, ...]
    sigmas: tuple[float, ...]
    argument: Literal["timesteps", "sigmas"] | None = None
    euler_last: bool = False
    scales: bool = False


def find_recipe(result: Result) -> Recipe:
    """The diffusers scheduler for a result.

    ``ConfigError`` where there is none that takes its solver's steps on an uneven list, or none with its settings.
    """
    recipe, how = None, "on such a list"
    if result.amplification_cap is not None:
        how = f"with an amplification cap of {result.amplification_cap:g}"
    elif result.eta not in (0, 1) or (result.eta and result.solver != "ddim"):
        how = f"with eta = {result.eta:g}"
    elif result.solver in RECIPES:
        recipe = RECIPES[result.solver](result)
    if recipe is None:
        raise ConfigError(
            f"diffusers has no scheduler that takes the steps of {result.solver} {how}; draw images with "
            f"{program()} sample --result FILE, or with the script of {program()} export --format diffusers"
        )
    return recipe


def _positive(levels: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(max(level, NO_NOISE) for level in levels)


def _recipe(result: Result, scheduler: str, options: dict[str, Any], **more: Any) -> Recipe:
    given = {"timesteps": result.noise.model_times if result.is_flow else result.timesteps, "sigmas": result.levels}
    return Recipe(scheduler, options, len(result.timesteps), **{**given, **more})


def _common(result: Result) -> dict[str, Any]:
    """Options of all schedulers of the DPM-Solver family, UniPC and DEIS, whatever the pipeline's own config says."""
    options: dict[str, Any] = {**NO_RAMP, "thresholding": result.model.clip}
    if result.model.clip:  # a ratio and maximum of 1 make thresholding a plain clip to [-1, 1]
        options |= {"dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
    if result.is_flow:
        options |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        options |= {"flow_shift": 1.0, "use_dynamic_shifting": False}
    return options


def _dpm_solver(scheduler: str, result: Result, by_noise: bool, **options: Any) -> Recipe:
    """DPM-Solver++, or DPM-Solver, which weighs the noise (``by_noise``)."""
    all_options = {
        "algorithm_type": "dpmsolver" if by_noise else "dpmsolver++",
        "solver_type": "midpoint",
        "final_sigmas_type": "sigma_min" if by_noise else result.final,
        "variance_type": None,
        **options,
        **_common(result),
    }
    sigmas = _positive(result.levels) if by_noise else result.levels
    listed = not result.is_flow and sigmas == result.levels
    return _recipe(result, scheduler, all_options, sigmas=sigmas, argument="timesteps" if listed else None)


def _multistep(result: Result, order: int, by_noise: bool = False) -> Recipe | None:
    to_zero = result.final == "zero"
    lower = not to_zero and len(result.timesteps) < 10  # the authors' rule; diffusers' own is below 15
    stuck = order == 3 and not lower and not to_zero and result.timesteps[-1] == 0  # NaN: a step of no length
    if (by_noise and result.is_flow) or stuck:
        return None
    return _dpm_solver(
        "DPMSolverMultistepScheduler",
        result,
        by_noise,
        solver_order=order,  # order 1 is DDIM, exactly, on any list of timesteps
        lower_order_final=lower,
        euler_at_final=by_noise and to_zero,
        use_lu_lambdas=False,
        **({"algorithm_type": "sde-dpmsolver++"} if result.eta else {}),
    )


def _first_order(result: Result) -> Recipe | None:
    if not result.is_flow or result.eta or result.model.clip:  # diffusers' scheduler of flows cannot clip
        return _multistep(result, order=1)
    options = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "stochastic_sampling": False}
    argument = "sigmas" if result.final == "zero" else None
    return _recipe(result, "FlowMatchEulerDiscreteScheduler", {**options, **NO_RAMP}, argument=argument)


def _singlestep(result: Result, by_noise: bool = False) -> Recipe | None:
    if by_noise and (result.is_flow or result.model.clip):  # diffusers clips by the wrong levels there
        return None
    lower = result.final == "zero" or len(result.timesteps) % 2 == 1
    name = "DPMSolverSinglestepScheduler"
    return _dpm_solver(name, result, by_noise, solver_order=2, lower_order_final=lower)


def _unipc(result: Result, order: int) -> Recipe:
    options = {"solver_type": "bh2", "solver_order": order, "predict_x0": True}
    options |= {"lower_order_final": True, "disable_corrector": [], **_common(result)}
    return _recipe(result, "UniPCMultistepScheduler", options)


def _deis(result: Result, order: int) -> Recipe:
    to_zero = result.final == "zero"
    options = {"algorithm_type": "deis", "solver_type": "logrho", "solver_order": order}
    options |= {"lower_order_final": not to_zero and len(result.timesteps) < 10, **_common(result)}
    return _recipe(result, "DEISMultistepScheduler", options, sigmas=_positive(result.levels), euler_last=to_zero)


def _lms(result: Result) -> Recipe | None:
    if result.is_flow or result.model.clip:  # it has neither
        return None
    return _recipe(result, "LMSDiscreteScheduler", {"timestep_spacing": "leading", **NO_RAMP}, scales=True)


def _heun(result: Result) -> Recipe | None:
    """Every level but the first is visited twice, before and after its step is corrected."""
    if result.is_flow:  # diffusers averages velocities there, over s and not over sigma / alpha
        return None
    first, *others = result.timesteps
    start, *inner, final = result.levels
    timesteps = (first, *(t for other in others for t in (other, other)))
    sigmas = (start, *(s for level in inner for s in (level, level)), final)
    if result.final != "zero":  # above no noise the last step is corrected too, which diffusers' own list never is
        timesteps, sigmas = (*timesteps, 0), (*sigmas, final)
    # Leading spacing scales the first noise by sqrt(1 + sigma^2).
    options = {"timestep_spacing": "leading", "clip_sample": result.model.clip, "clip_sample_range": 1.0, **NO_RAMP}
    # It takes a list of timesteps, but has betas of its own where the model's config leaves them out.
    return _recipe(result, "HeunDiscreteScheduler", options, timesteps=timesteps, sigmas=sigmas, scales=True)


RECIPES: dict[str, Callable[[Result], Recipe | None]] = {
    "ddim": _first_order,
    "euler": _first_order,
    "heun": _heun,
    "lms": _lms,
    "dpm_solver_2": partial(_multistep, order=2, by_noise=True),
    "dpm_solver_3": partial(_multistep, order=3, by_noise=True),
    "dpm_solver_2s": partial(_singlestep, by_noise=True),
    "dpmpp_2s": _singlestep,
    "dpmpp_2m": partial(_multistep, order=2),
    "dpmpp_3m": partial(_multistep, order=3),
    "unipc_2": partial(_unipc, order=2),
    "unipc_3": partial(_unipc, order=3),
    "deis_2": partial(_deis, order=2),
    "deis_3": partial(_deis, order=3),
}
"""Solver -> its recipe, or None where the scheduler lacks what the result needs."""
