"""What a study is made of: model, search space, sampler, evaluator and baselines, from its config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import Range, SamplingConfig, StudyConfig
from autodiffusion_optuna.errors import ConfigError, StatisticsError, choose_from
from autodiffusion_optuna.evaluation.evaluator import Evaluator, largest_batch
from autodiffusion_optuna.evaluation.features import Extractor, load_extractor
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.prefix_cache import PrefixCache
from autodiffusion_optuna.evaluation.references.reference import (
    Reference,
    check_images,
    doubts,
    load_reference,
    too_few,
)
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.sanity import check_model
from autodiffusion_optuna.evaluation.solvers import ORDERS, query_steps, solver_names
from autodiffusion_optuna.noise import Final
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.timesteps import baseline_timesteps


@dataclass(frozen=True, eq=False)
class StudyComponents:
    """Everything a study is made of, checked and loaded; nothing is written yet."""

    config: StudyConfig
    model: Model
    space: SearchSpace
    sampler: AutoDiffusionSampler
    evaluator: Evaluator
    baselines: dict[str, Candidate]
    """Baselines by name, at the largest number of full steps the budget allows."""
    sanity: tuple[str, ...] = ()
    """What is doubtful about the model itself, a line each."""


def build(
    config: StudyConfig,
    *,
    trust: bool = False,
    unit_costs: tuple[float, ...] | None = None,
    device: str | None = None,
    batch: int | None = None,
) -> StudyComponents:
    """Load and check the parts of a study (AdoptError children).

    ``unit_costs``, ``batch``: the shares and the batch it was begun with. ``device``: this worker's, instead of the
    config's, which all share.
    """
    if trust and config.folder is not None and config.folder not in sys.path:
        sys.path.insert(0, config.folder)  # and left there, for what the plug-ins import later
    plan = read_sampling(config.sampling)  # a wrong solver is refused before a large model is loaded
    model = load_model(config.model, device=device, trust=trust)
    for scale in plan.guidance:
        model.check_scale(scale)
    if batch is None:
        batch = largest_batch(model) if config.model.batch == "auto" else config.model.batch
    space = _space(config, plan, model, batch, unit_costs)
    extractor = load_extractor(
        config.score.extractor,
        model.device,
        weights=None if config.score.weights is None else Path(config.score.weights),
        trust=trust,
        mode=config.score.mode,
        image_shape=model.picture_shape,
    )
    reference = _reference(config, model, extractor)
    evaluator = Evaluator(
        model=model,
        sampling=plan.fixed,
        extractor=extractor,
        reference=reference,
        metric=config.score.metric,
        seed=config.score.seed,
        batch=batch,
        prefix_cache=PrefixCache(config.model.prefix_cache_mb * 2**20) if config.model.prefix_cache_mb else None,
    )
    check_images(reference, model.picture_shape)
    _check_features(evaluator)
    baselines = _baselines(model, space)
    warm_starts(config, baselines)  # an unknown name is refused before anything is written
    sanity = check_model(model, reference.images, batch) if config.model.check else []
    return StudyComponents(config, model, space, _sampler(config, space), evaluator, baselines, tuple(sanity))


@dataclass(frozen=True)
class SamplingSpace:
    """``[sampling]`` taken apart: what is fixed, and what the search chooses.

    ``fixed``: the settings of every run, the first of each choice among them. ``choices``, ``ranges``: searched
    settings by name. ``guidance``: the scales that may occur, ends of a range included.
    """

    fixed: Sampling
    choices: dict[str, tuple[str | float, ...]]
    ranges: dict[str, tuple[float, float]]
    guidance: tuple[float | None, ...]


def read_sampling(sampling: SamplingConfig) -> SamplingSpace:
    """What a study's ``[sampling]`` asks for (ConfigError for a solver, an order or a cap that does not exist)."""
    given: dict[str, tuple[str | float, ...]] = {
        "solver": tuple(_solvers(sampling)),
        "final": tuple(_listed(sampling.final)),
    }
    ranges: dict[str, tuple[float, float]] = {}
    for name, value in (("guidance", sampling.guidance), ("eta", sampling.eta)):
        if isinstance(value, Range):
            ranges[name] = (value.min, value.max)
        elif value is not None:
            given[name] = tuple(dict.fromkeys(float(v) for v in _listed(value)))
    for solver in given["solver"]:
        Sampling(str(solver), cap=sampling.amplification_cap).find_solver()
    first: dict[str, Any] = {name: values[0] for name, values in given.items()}
    choices = {name: values for name, values in given.items() if len(values) > 1}
    scales = ranges.get("guidance", given.get("guidance", (None,)))
    fixed = Sampling(**first, cap=sampling.amplification_cap)
    return SamplingSpace(fixed, choices, ranges, tuple(None if s is None else float(s) for s in scales))


def _solvers(sampling: SamplingConfig) -> list[str]:
    """Registered names of all solvers asked for; in a list, orders count for the solvers that come in several."""
    families, orders = _listed(sampling.solver), _listed(sampling.order)
    single = len(families) == 1
    names = [solver_names(f, order if single or f in ORDERS else None) for f in families for order in orders]
    return list(dict.fromkeys(names))


def _listed(value: Any) -> list[Any]:
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


def _baselines(model: Model, space: SearchSpace) -> dict[str, Candidate]:
    """Baselines by name, with the first of each searched setting; and uniform with each of the others."""
    lists = baseline_timesteps(model.schedule, space.full_steps, space.min_gap)
    # Where no candidate can keep every layer on, the baselines skip what the budget makes them skip.
    found = {name: space.fit(Candidate(timesteps), space.max_skip) for name, timesteps in lists.items()}
    start = dict(found["uniform"].settings)
    for setting, values in space.choices.items():
        for value in values[1:]:
            settings = tuple(sorted({**start, setting: value}.items()))
            other = replace(found["uniform"], settings=settings)
            found[f"uniform, {setting} {value}"] = space.fit(other, space.max_skip)
    return found


def _check_features(evaluator: Evaluator) -> None:
    """Embed two empty images, so that components that do not fit are refused before anything is written."""
    blank = torch.zeros(2, *evaluator.model.picture_shape, dtype=torch.uint8, device=evaluator.model.device)
    given, wanted = evaluator.extractor(blank).shape[1], len(evaluator.reference.mu)
    if given != wanted:
        raise StatisticsError(
            f"extractor {evaluator.extractor.name!r} gives {given} features for the model's images of "
            f"{list(evaluator.model.picture_shape)}, the reference has {wanted}; use a reference of images of that size"
        )


def _space(
    config: StudyConfig, plan: SamplingSpace, model: Model, batch: int, unit_costs: tuple[float, ...] | None
) -> SearchSpace:
    low, high = config.sampling.step_bounds
    units = model.units if config.search.max_skip else ()
    if config.search.max_skip and not model.units:
        raise ConfigError(
            f"search.max_skip = {config.search.max_skip} but model {config.model.source!r} has no layers that can be "
            "skipped; set search.max_skip=0"
        )
    if units and unit_costs is None:
        unit_costs = model.costs(config.search.cost, batch=batch).shares
    full = config.search.cost_steps or high
    visits = partial(_visits, plan.fixed)
    return SearchSpace(
        T=model.schedule.T,
        min_steps=low,
        max_steps=high,
        min_gap=config.sampling.min_gap,
        units=units,
        unit_costs=unit_costs if units and unit_costs else (),
        max_skip=config.search.max_skip,
        max_cost=None if config.search.max_cost is None else config.search.max_cost * len(visits(full, {})),
        visits=visits,
        chunk=config.search.chunk,
        choices=plan.choices,
        ranges=plan.ranges,
    )


def _visits(fixed: Sampling, steps: int, settings: Mapping[str, str | float]) -> tuple[int, ...]:
    """Step of each network evaluation, the study's own settings standing in for those that are not searched."""
    final = settings.get("final", fixed.final)
    assert final in ("zero", "sigma_min")
    return query_steps(str(settings.get("solver", fixed.solver)), steps, cast(Final, final))


def _sampler(config: StudyConfig, space: SearchSpace) -> AutoDiffusionSampler:
    search = config.search
    return AutoDiffusionSampler(
        space,
        preset=search.preset,
        population_size=search.population,
        parents=search.parents,
        mutation=search.mutations,
        crossover=search.crossovers,
        mutation_probability=search.mutation_probability,
        stage_one_generations=search.stage_one_generations,
        barrier=search.barrier,
        seed=search.seed,
    )


def _reference(config: StudyConfig, model: Model, extractor: Extractor) -> Reference:
    """The statistics that the config names, else those that the model ships with."""
    if config.score.reference is not None:
        return load_reference(Path(config.score.reference), extractor)
    if model.reference is None:
        raise ConfigError(
            f"model {config.model.source!r} ships with no reference; set score.reference to statistics (npz) or to a "
            "folder of images like those the model was trained on"
        )
    return model.reference(extractor)


def warm_starts(config: StudyConfig, baselines: dict[str, Candidate]) -> list[str]:
    """Names of the baselines that are evaluated first (ConfigError for one that does not exist)."""
    names = config.search.warm_starts
    if names is None:
        return ["uniform"] if config.search.preset == "paper" else list(baselines)
    for name in names:
        if name not in baselines:
            raise ConfigError("search.warm_starts: " + choose_from("baseline", name, baselines))
    return names


def relative_cost(components: StudyComponents, candidate: Candidate) -> float:
    """Cost of a candidate, 1.0 being ``search.cost_steps`` steps with every layer on and the first of the solvers."""
    full = components.config.search.cost_steps or components.space.max_steps
    return components.space.cost(candidate) / len(components.space.visits(full, {}))


def metric_name(components: StudyComponents) -> str:
    """How the value is called in print: FID for Inception alone, else FD or KID with the extractor's name."""
    extractor = components.evaluator.extractor
    if components.config.score.metric == "kid":
        return f"KID({extractor.name})"
    return "FID" if extractor.metric == "FID" else f"FD({extractor.name})"


def too_few_images(components: StudyComponents, images: int) -> str | None:
    """A warning where a distance of so many images is no measure; None where there is nothing to say."""
    return (
        too_few(images, len(components.evaluator.reference.mu)) if components.config.score.metric == "frechet" else None
    )


def warnings(components: StudyComponents, images: int) -> list[str]:
    """What to know about distances of so many images in this study, a line each; none where there is nothing."""
    few = too_few_images(components, images)
    slow = components.model.device.type == "cpu" and components.config.model.precision != "float32"
    reduced = (
        f"model.precision {components.config.model.precision!r} is mostly slower than float32 on a CPU"
        if slow
        else None
    )
    reference = components.evaluator.reference
    doubtful = doubts(reference, components.model.picture_shape, components.config.score.metric)
    return [
        line
        for line in (*components.model.notes, *components.sanity, *reference.notes, *doubtful, few, reduced)
        if line
    ]
