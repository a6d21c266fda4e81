"""Results with timesteps that no search found: a list that was given, and any list at another number of steps."""

from __future__ import annotations

import re

from autodiffusion_optuna.config import StudyConfig
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.formats import result_of
from autodiffusion_optuna.export.result import NoisePart, OriginPart, Result
from autodiffusion_optuna.results.summary import StudySummary
from autodiffusion_optuna.search.lists import read_list
from autodiffusion_optuna.search.timesteps import resample


def derived_result(
    summary: StudySummary, given: str | None = None, steps: int | None = None
) -> tuple[Result, list[str]]:
    """The best candidate's result with other timesteps and the same settings; and what changed, a line each.

    ``given``: a list in place of the best candidate's. ``steps``: interpolated in log-SNR to so many. Layers are
    skipped at the timesteps that the search found them for, and at no others. ``ConfigError`` for what is no list, and
    for more steps than the model has.
    """
    result = result_of(summary)
    if given is None and steps in (None, len(result.timesteps)):
        return result, []
    timesteps, label, notes = result.timesteps, None, list[str]()
    if given is not None:
        read = read_list(given, summary.noise)
        timesteps, label, notes = read.timesteps, read.label, [*read.notes]
    origin = OriginPart(list=label)
    if steps is not None and steps != len(timesteps):
        gap = summary.config.sampling.min_gap
        if (steps - 1) * gap >= summary.noise.T:
            most = (summary.noise.T - 1) // gap + 1
            raise ConfigError(f"--steps {steps} is more than fit on the model's grid; give {most} or fewer")
        origin = OriginPart(list=label, interpolated_from=len(timesteps))
        timesteps = resample(summary.noise, timesteps, steps, gap)
    notes.append(f"these are {origin}: they have no score of their own")
    if result.masked:
        notes.append(
            "the layers that the best candidate skips or reuses were found for its own timesteps: all run here"
        )
    changed = result.model_copy(
        update={
            "study": _name(result.study, label, len(timesteps)),
            "timesteps": timesteps,
            "skips": ((),) * len(timesteps),
            "reuses": ((),) * len(timesteps),
            "cost": _full_cost(summary.config, result, len(timesteps)),
            "score": None,
            "origin": origin,
            "noise": NoisePart.of(summary.noise, timesteps, result.final),
        }
    )
    return changed, notes


def _name(study: str, label: str | None, steps: int) -> str:
    """Name of the files, which are not to take the place of the study's own."""
    named = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-") if label else ""
    return "-".join(part for part in (study, named, f"{steps}-steps") if part)


def _full_cost(config: StudyConfig, result: Result, steps: int) -> float:
    """Cost of so many steps with every layer on, 1.0 being the study's full run with the first of its solvers."""
    from autodiffusion_optuna.evaluation.solvers import evaluations
    from autodiffusion_optuna.study.components import read_sampling

    first = read_sampling(config.sampling).fixed
    full = evaluations(first.solver, config.search.cost_steps or config.sampling.step_bounds[1], first.final)
    return evaluations(result.solver, steps, result.final) / full
