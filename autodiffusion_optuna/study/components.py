"""What a study is made of: model, search space, sampler, evaluator and baselines, from its config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from autodiffusion_optuna.candidate import Candidate, Value
from autodiffusion_optuna.config import BUNDLED, MEMORY, Range, SamplingConfig, StudyConfig
from autodiffusion_optuna.errors import ConfigError, StatisticsError
from autodiffusion_optuna.evaluation.drawing import ImageSampler
from autodiffusion_optuna.evaluation.evaluator import Evaluator, largest_batch
from autodiffusion_optuna.evaluation.features import Extractor, check_extractor, load_extractor
from autodiffusion_optuna.evaluation.models import Model, check_source, find_device, load_model
from autodiffusion_optuna.evaluation.models.prompts import check_prompt_file
from autodiffusion_optuna.evaluation.prefix_cache import PrefixCache
from autodiffusion_optuna.evaluation.references.formats import require_reference
from autodiffusion_optuna.evaluation.references.reference import (
    Reference,
    build_reference,
    check_images,
    doubts,
    load_reference,
    too_few,
)
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.sanity import check_model
from autodiffusion_optuna.evaluation.solvers import ORDERS, query_steps, solver_names
from autodiffusion_optuna.noise import Final
from autodiffusion_optuna.results.headline import UNIFORM
from autodiffusion_optuna.search.presets import settings_of
from autodiffusion_optuna.search.repair import spread
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.search.timesteps import BASELINES, baseline_timesteps, uniform_timesteps
from autodiffusion_optuna.study.given import read_warm_starts
from autodiffusion_optuna.study.starts import screen_timesteps, start_order

UnitShares = Mapping[str, tuple[float, ...]]
"""Of a network evaluation, what each unit saves, by mode."""


@dataclass(frozen=True, eq=False)
class StudyComponents:
    """Everything a study is made of, checked and loaded; nothing is written yet."""

    config: StudyConfig
    model: Model
    space: SearchSpace
    sampler: AutoDiffusionSampler
    evaluator: Evaluator
    baselines: dict[str, Candidate]
    """Baselines by name, at the largest number of full steps the budget allows; see ``starts`` for computed ones."""
    sanity: tuple[str, ...] = ()
    """What is doubtful about the model itself, a line each."""
    warm_starts: tuple[str, ...] = ()
    """Names of the baselines that the search starts from, in the order in which they are tried."""
    offered: tuple[str, ...] = ()
    """The last of them, which are not enqueued: the sampler tries one at every second place."""
    list_notes: tuple[str, ...] = ()
    """What was changed in the lists of ``search.warm_starts``, a line each."""

    @property
    def images(self) -> ImageSampler:
        """What draws the images of candidates."""
        return self.evaluator.images


@dataclass(frozen=True, eq=False)
class ImageComponents:
    """What draws the images of a study's candidates and cannot score them; fields as of ``StudyComponents``."""

    config: StudyConfig
    model: Model
    space: SearchSpace
    images: ImageSampler
    baselines: dict[str, Candidate]


def build_images(
    config: StudyConfig,
    *,
    trust: bool = False,
    unit_costs: UnitShares | None = None,
    batch: int | None = None,
) -> ImageComponents:
    """As ``build``, without extractor and reference: no reference image is looked at."""
    _find_plug_ins(config, trust)
    return _load_images(config, read_sampling(config.sampling), trust, unit_costs, None, batch)


def build(
    config: StudyConfig,
    *,
    trust: bool = False,
    unit_costs: UnitShares | None = None,
    device: str | None = None,
    batch: int | None = None,
    model: Model | None = None,
    images: Tensor | None = None,
) -> StudyComponents:
    """Load and check the parts of a study (AdoptError children).

    ``unit_costs``, ``batch``: the shares and the batch it was begun with. ``device``: this worker's, instead of the
    config's, which all share. ``model``, and ``images`` uint8 [N, C, H, W] of the reference: in memory, in place of
    what the config names.
    """
    _find_plug_ins(config, trust)
    plan = check_config(config, trust=trust, in_memory=model is not None)
    loaded = _load_images(config, plan, trust, unit_costs, device, batch, model)
    model, baselines, drawn = loaded.model, loaded.baselines, loaded.images
    known = start_order(loaded.space, baselines)
    first = read_warm_starts(config.search, known, model.schedule, loaded.space)  # refused before anything else
    fit, most = loaded.space.fit, loaded.space.max_skip
    baselines |= {given.label: fit(Candidate(given.timesteps), most) for given in first.lists}
    offered = tuple(name for name in first.names if not first.chosen and name in BASELINES and name != UNIFORM)
    extractor = load_extractor(
        config.score.extractor,
        model.device,
        weights=_path(config.score.weights),
        trust=trust,
        mode=config.score.mode,
        image_shape=model.picture_shape,
    )
    reference = _reference(config, model, extractor, images)
    evaluator = Evaluator(
        model=model,
        sampling=drawn.sampling,
        extractor=extractor,
        reference=reference,
        metric=config.score.metric,
        seed=drawn.seed,
        batch=drawn.batch,
        prefix_cache=drawn.prefix_cache,
        screen_images=config.screen_images,
        screen_timesteps=screen_timesteps(loaded.space, model.schedule) if config.screen_images else (),
    )
    check_images(reference, model.picture_shape)
    _check_features(evaluator)
    sanity = check_model(model, reference.images, drawn.batch) if config.model.check else []
    return StudyComponents(
        config=config,
        model=model,
        space=loaded.space,
        sampler=_sampler(config, loaded.space),
        evaluator=evaluator,
        baselines=baselines,
        sanity=tuple(sanity),
        warm_starts=first.names,
        offered=offered,
        list_notes=tuple(note for given in first.lists for note in given.notes),
    )


def _find_plug_ins(config: StudyConfig, trust: bool) -> None:
    if trust and config.folder is not None and config.folder not in sys.path:
        sys.path.insert(0, config.folder)  # and left there, for what the plug-ins import later


def _load_images(
    config: StudyConfig,
    plan: SamplingSpace,
    trust: bool,
    unit_costs: UnitShares | None,
    device: str | None,
    batch: int | None,
    model: Model | None = None,
) -> ImageComponents:
    model = load_model(config.model, device=device, trust=trust) if model is None else model
    for scale in plan.guidance:
        model.check_scale(scale)
    if batch is None:
        batch = largest_batch(model) if config.model.batch == "auto" else config.model.batch
    space = _space(config, plan, model, batch, unit_costs)
    cache = PrefixCache(config.model.prefix_cache_mb * 2**20) if config.model.prefix_cache_mb else None
    images = ImageSampler(model, plan.fixed, config.score.seed, batch, cache)
    return ImageComponents(config, model, space, images, _baselines(model, space))


def check_config(config: StudyConfig, *, trust: bool = False, in_memory: bool = False) -> SamplingSpace:
    """What can be checked of a config before a model is loaded and images are embedded (AdoptError children).

    ``in_memory``: whether the model is there already, and the config names neither it nor a reference.
    """
    model, score = config.model, config.score
    find_device(model.device)
    settings_of(config.search.preset)
    plan = read_sampling(config.sampling)
    if not in_memory:
        check_source(model)
    check_extractor(score.extractor, _path(score.weights), trust, score.mode)
    if model.prompts is not None:
        check_prompt_file(Path(model.prompts))
    for setting, place in (("model.classifier", model.classifier), ("model.config", model.config)):
        if place is not None and not Path(place).exists():
            raise ConfigError(f"{setting} = {place!r} does not exist; give the path of what is there")
    if score.reference is not None and not score.reference.startswith(MEMORY):
        require_reference(Path(score.reference))
    elif not in_memory and model.source not in BUNDLED and not model.source.startswith("python:"):
        raise _no_reference(config)
    return plan


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)


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
    for setting, values in space.choices.items():
        for value in values[1:]:
            settings = {**space.default_settings, setting: value}
            found[f"uniform, {setting} {value}"] = uniform_with(space, settings)
    return found


def uniform_with(space: SearchSpace, settings: Mapping[str, Value]) -> Candidate:
    """Uniform timesteps with these settings, at the largest number of full steps the budget allows with them."""
    timesteps = uniform_timesteps(space.T, space.full_steps_with(settings))
    candidate = Candidate(spread(timesteps, space.T, space.min_gap), settings=tuple(sorted(settings.items())))
    return space.fit(candidate, space.max_skip)


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
    config: StudyConfig, plan: SamplingSpace, model: Model, batch: int, unit_costs: UnitShares | None
) -> SearchSpace:
    low, high = config.sampling.step_bounds
    units = model.units if config.search.max_skip else ()
    if config.search.max_skip and not model.units:
        raise ConfigError(
            f"search.max_skip = {config.search.max_skip} but model {config.model.source!r} has no layers that can be "
            "skipped or reused; set search.max_skip=0"
        )
    if units and unit_costs is None:
        costs = model.costs(config.search.cost, batch=batch)
        unit_costs = {"skip": costs.shares, "reuse": costs.reuse_shares}
    full = config.search.cost_steps or high
    visits = partial(_visits, plan.fixed)
    return SearchSpace(
        T=model.schedule.T,
        min_steps=low,
        max_steps=high,
        min_gap=config.sampling.min_gap,
        units=units,
        modes=tuple(config.search.modes),
        unit_costs=unit_costs["skip"] if units and unit_costs else (),
        reuse_costs=unit_costs["reuse"] if units and unit_costs else (),
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
        thrifty=True,
        seed=search.seed,
    )


def _reference(config: StudyConfig, model: Model, extractor: Extractor, images: Tensor | None) -> Reference:
    """Those of images in memory, else the statistics that the config names, else those that the model ships with."""
    if images is not None:
        return build_reference(images, extractor, "images")
    if config.score.reference is not None:
        return load_reference(Path(config.score.reference), extractor)
    if model.reference is None:
        raise _no_reference(config)
    return model.reference(extractor)


def _no_reference(config: StudyConfig) -> ConfigError:
    return ConfigError(
        f"model {config.model.source!r} ships with no reference; set score.reference to statistics (npz) or to a "
        "folder of images like those the model was trained on"
    )


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
    known = (*components.model.notes, *components.sanity, *components.list_notes, *reference.notes)
    return [line for line in (*known, *doubtful, few, reduced) if line]
