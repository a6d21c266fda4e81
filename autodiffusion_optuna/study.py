"""The composition root: the only file that sees both the search and the evaluation."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, PercentilePruner
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autodiffusion_optuna import __version__, records
from autodiffusion_optuna.artifacts import (
    attach_picture,
    default_folder,
    location_of,
    notable,
    open_store,
    stored_location,
)
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.claims import FAILURE, OWNER, Claim, Heart, claim, is_mine, owner, put_back
from autodiffusion_optuna.config import Range, SamplingConfig, StudyConfig
from autodiffusion_optuna.errors import AdoptError, ConfigError, StatisticsError, StudyError, choose_from
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.evaluator import Evaluator, Score, largest_batch
from autodiffusion_optuna.evaluation.features import Extractor, load_extractor
from autodiffusion_optuna.evaluation.models import Model, Options, load_model
from autodiffusion_optuna.evaluation.prefix import PrefixMemory
from autodiffusion_optuna.evaluation.reference import Reference, check_images, doubts, load_reference, too_few
from autodiffusion_optuna.evaluation.runtime import describe_runtime
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.sanity import check_model
from autodiffusion_optuna.evaluation.solvers import ORDERS, query_steps, solver_names
from autodiffusion_optuna.noise import Final
from autodiffusion_optuna.report import peek, require_files, require_same, stored_batch, stored_unit_costs
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.schedules import KNOWN, known_schedules
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.storage import StudyStorage, check_place, open_storage

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

_log = logging.getLogger("autodiffusion_optuna")

MAX_FAILURES = 10
"""Trials that may fail in a row before the run gives up."""
BEATS = 4
"""Heartbeats in the time after which a silent worker counts as dead."""
FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0
"""Seconds between looks for a place while other workers hold them all."""
PICTURES = 16
"""Images kept of a notable trial."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything a study is made of, checked and loaded; nothing is written yet."""

    config: StudyConfig
    model: Model
    space: SearchSpace
    sampler: AutoDiffusionSampler
    evaluator: Evaluator
    known: dict[str, Candidate]
    """Known schedules by name, at the largest number of full steps the budget allows."""
    sanity: tuple[str, ...] = ()
    """What is doubtful about the model itself, a line each."""


@dataclass(frozen=True)
class Progress:
    """What the screen is told after every trial."""

    trial: FrozenTrial
    finished: int
    seconds: float


OnTrial = Callable[[Progress], None]


def build(
    config: StudyConfig,
    *,
    trust: bool = False,
    unit_costs: tuple[float, ...] | None = None,
    device: str | None = None,
    batch: int | None = None,
) -> Parts:
    """Load and check the parts of a study (AdoptError children).

    ``unit_costs``, ``batch``: the shares and the batch it was begun with. ``device``: this worker's, instead of the
    config's, which all share.
    """
    if config.folder is not None and config.folder not in sys.path:
        sys.path.insert(0, config.folder)  # and left there, for what the plug-ins import later
    plan = read_plan(config.sampling)  # a wrong solver is refused before a large model is loaded
    model = open_model(config, trust, device)
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
        memory=PrefixMemory(config.model.memory_mb * 2**20) if config.model.memory_mb else None,
    )
    check_images(reference, model.picture_shape)
    _check_features(evaluator)
    known = _known(model, space)
    _warm_starts(config, known)  # an unknown name is refused before anything is written
    sanity = check_model(model, reference.images, batch) if config.model.check else []
    return Parts(config, model, space, _sampler(config, space), evaluator, known, tuple(sanity))


def open_model(config: StudyConfig, trust: bool = False, device: str | None = None) -> Model:
    """The model of a study, on ``device`` or else the config's (ModelError, ConfigError)."""
    model = config.model
    options = Options(
        preset=model.preset,
        fields=model.fields,
        classifier=None if model.classifier is None else Path(model.classifier),
        guidance=None,  # the study's scale belongs to sampling, where it may be searched
        labels=model.labels,
        prompts=None if model.prompts is None else Path(model.prompts),
        negative_prompt=model.negative_prompt,
        size=None if model.size is None else (model.size[0], model.size[1]),
        reduced=model.precision != "float32",
        compile=model.compile,
        config=None if model.config is None else Path(model.config),
        trust=trust,
    )
    return load_model(model.source, device or model.device, model.precision, model.clip, options)


@dataclass(frozen=True)
class SamplingPlan:
    """``[sampling]`` taken apart: what is fixed, and what the search chooses.

    ``fixed``: the settings of every run, the first of each choice among them. ``choices``, ``ranges``: searched
    settings by name. ``guidance``: the scales that may occur, ends of a range included.
    """

    fixed: Sampling
    choices: dict[str, tuple[str | float, ...]]
    ranges: dict[str, tuple[float, float]]
    guidance: tuple[float | None, ...]


def read_plan(sampling: SamplingConfig) -> SamplingPlan:
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
    return SamplingPlan(fixed, choices, ranges, tuple(None if s is None else float(s) for s in scales))


def _solvers(sampling: SamplingConfig) -> list[str]:
    """Registered names of all solvers asked for; in a list, orders count for the solvers that come in several."""
    families, orders = _listed(sampling.solver), _listed(sampling.order)
    single = len(families) == 1
    names = [solver_names(f, order if single or f in ORDERS else None) for f in families for order in orders]
    return list(dict.fromkeys(names))


def _listed(value: Any) -> list[Any]:
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


def _known(model: Model, space: SearchSpace) -> dict[str, Candidate]:
    """Known schedules by name, with the first of each searched setting; and uniform with each of the others."""
    lists = known_schedules(model.schedule, space.full_steps, space.min_gap)
    # Where no candidate can keep every layer on, the known schedules skip what the budget makes them skip.
    known = {name: space.fit(Candidate(timesteps), space.max_skip) for name, timesteps in lists.items()}
    start = dict(known["uniform"].settings)
    for setting, values in space.choices.items():
        for value in values[1:]:
            settings = tuple(sorted({**start, setting: value}.items()))
            other = replace(known["uniform"], settings=settings)
            known[f"uniform, {setting} {value}"] = space.fit(other, space.max_skip)
    return known


def _check_features(evaluator: Evaluator) -> None:
    """Embed two empty images, so that parts that do not fit are refused before anything is written."""
    blank = torch.zeros(2, *evaluator.model.picture_shape, dtype=torch.uint8, device=evaluator.model.device)
    given, wanted = evaluator.extractor(blank).shape[1], len(evaluator.reference.mu)
    if given != wanted:
        raise StatisticsError(
            f"extractor {evaluator.extractor.name!r} gives {given} features for the model's images of "
            f"{list(evaluator.model.picture_shape)}, the reference has {wanted}; use a reference of images of that size"
        )
    evaluator.check_metric()


def _space(
    config: StudyConfig, plan: SamplingPlan, model: Model, batch: int, unit_costs: tuple[float, ...] | None
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
    assert final in ("one", "first")
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


def _warm_starts(config: StudyConfig, known: dict[str, Candidate]) -> list[str]:
    names = config.search.warm_starts
    if names is None:
        return ["uniform"] if config.search.preset == "paper" else list(known)
    for name in names:
        if name not in known:
            raise ConfigError("search.warm_starts: " + choose_from("schedule", name, known))
    return names


def open_study(parts: Parts, storage: StudyStorage, pictures: str | None = None) -> optuna.Study:
    """Create the study, or resume it after checking that it measures the same.

    ``pictures``: where a new study keeps them, as it is stored. Raises StudyError with the differences where it
    does not.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=parts.config.name,
        storage=storage,
        sampler=parts.sampler,
        pruner=_pruner(parts.config),
        direction="minimize",
        load_if_exists=True,
    )
    with storage.claiming(study._study_id):  # of workers that start together one begins it, the others find it begun
        begun = records.READY in study.user_attrs
        if not begun and study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE)):
            raise StudyError(f"study {study.study_name!r} exists but was not made by adopt; choose another name")
        if records.CONFIG in study.user_attrs:  # also where whoever began it was stopped: its queue is of that config
            check_same(parts, study)
        if not begun:
            _begin(parts, study, pictures)
    if begun:
        _describe_run(parts, study)
    if records.NOISE not in study.user_attrs:  # begun by an older version
        _describe_model(parts, study)
    return study


@dataclass(frozen=True, eq=False)
class Run:
    """A study that is ready to be worked on."""

    parts: Parts
    study: optuna.Study
    storage: StudyStorage
    store: ArtifactStore | None


def open_run(
    config: StudyConfig,
    url: str,
    *,
    trust: bool = False,
    artifacts: str | None = None,
    device: str | None = None,
    known: bool = False,
) -> Run:
    """Build a study's parts, and create or resume it at ``url``.

    ``artifacts``: where its pictures go, as ``artifacts.open_store`` takes it; None leaves that as it is, or for a new
    study in SQLite beside the database. ``device``: this worker's, instead of the config's. ``known``: whether the
    database has answered before; it is then waited for. Raises AdoptError children before anything is written.
    """
    begun = peek(url, config.name, known=known)
    if begun is not None:
        require_same(begun, config)
        require_files(begun, config)
    parts = build(config, trust=trust, unit_costs=stored_unit_costs(begun), device=device, batch=stored_batch(begun))
    check_place(url)
    parts.evaluator.prepare(0, config.score.images)  # prompts too many for this machine are refused here
    location = _location(begun, url, artifacts)
    store = None if location is None else open_store(location_of(location, url))
    storage = open_storage(url, known=True)  # it answered a moment ago
    study = open_study(parts, storage, location)
    batch = stored_batch(study)
    if batch is not None and begun is None:  # another worker that started together with this one has begun the study
        parts = replace(parts, evaluator=replace(parts.evaluator, batch=batch))
    if location is not None and location != study.user_attrs.get(records.ARTIFACTS):
        study.set_user_attr(records.ARTIFACTS, location)
    return Run(parts, study, storage, store)


def _location(begun: optuna.Study | None, url: str, given: str | None) -> str | None:
    """Where pictures go, as it is stored."""
    if given is not None:
        return stored_location(given, url)
    kept = None if begun is None else begun.user_attrs.get(records.ARTIFACTS)
    location = default_folder(url) if begun is None else kept and location_of(kept, url)
    return None if location is None else stored_location(location, url)


def _describe_model(parts: Parts, study: optuna.Study) -> None:
    """Write down what an export needs to know of the model."""
    model = parts.model
    facts = {
        "kind": model.kind,
        "prediction": model.denoiser.prediction if isinstance(model.denoiser, Denoiser) else None,
        "shape": list(model.shape),
        "image_shape": list(model.picture_shape),
        "units": list(model.units),
        "latent_scale": model.latent_scale,
        "weights": None if model.weights is None else dict(model.weights),
        "guidance": model.guidance,
        "scale": model.scale,
    }
    study.set_user_attr(records.MODEL_FACTS, facts)
    study.set_user_attr(records.NOISE, model.schedule.pack())


def _pruner(config: StudyConfig) -> BasePruner:
    startup = config.search.population or 10
    if config.score.pruner == "percentile":
        return PercentilePruner(100 * config.score.keep, n_startup_trials=startup)
    if config.score.pruner == "median":
        return MedianPruner(n_startup_trials=startup)
    return NopPruner()


def _identity(parts: Parts) -> dict[str, Any]:
    """What must be equal for values to be compared, besides the config; stored with the study."""
    conditions = parts.model.conditions
    return {
        "codec": parts.space.codec(),
        "model": parts.model.fingerprint,
        "extractor": parts.evaluator.extractor.fingerprint,
        "reference": parts.evaluator.reference.digest,
        "conditions": None if conditions is None else conditions.fingerprint,
    }


def _describe_run(parts: Parts, study: optuna.Study) -> None:
    """Write what is so in this run: a longer budget, where files are now, and what there is to be warned of."""
    study.set_user_attr(records.CONFIG, parts.config.model_dump(mode="json"))
    study.set_user_attr(records.WARNINGS, warnings(parts, parts.config.score.images))
    if parts.config.model.check:  # else what an earlier check found stays true
        study.set_user_attr(records.SANITY, list(parts.sanity))
    study.set_user_attr(records.REFERENCE_IMAGES, parts.evaluator.reference.n)


def _begin(parts: Parts, study: optuna.Study, pictures: str | None) -> None:
    """Write what the study is and enqueue the known schedules; may be killed anywhere and repeated."""
    _describe_run(parts, study)
    if pictures is not None:
        study.set_user_attr(records.ARTIFACTS, pictures)
    for key, value in _identity(parts).items():
        study.set_user_attr(key, value)
    _describe_model(parts, study)
    study.set_user_attr(records.RUNTIME, describe_runtime(parts.evaluator))
    study.set_user_attr(records.VERSION, __version__)
    study.set_user_attr(records.METRIC, metric_name(parts))
    study.set_user_attr(records.UNIT_COSTS, list(parts.space.unit_costs))
    costs = {name: relative_cost(parts, candidate) for name, candidate in parts.known.items()}
    study.set_user_attr(records.KNOWN_COSTS, costs)
    study.set_user_attr(records.KNOWN, {name: candidate.key for name, candidate in parts.known.items()})
    starts: dict[str, str] = {}
    for name in _warm_starts(parts.config, parts.known):
        starts.setdefault(parts.known[name].key, name)  # two names may mean the same list
    enqueued = len(study.get_trials(deepcopy=False))
    for key, name in list(starts.items())[enqueued:]:
        params = parts.space.encode(Candidate.from_key(key))
        study.enqueue_trial(params, user_attrs={records.KNOWN_NAME: name})
    study.set_user_attr(records.READY, True)


def check_same(parts: Parts, study: optuna.Study) -> None:
    """StudyError naming what differs where new values could not be compared with the study's."""
    require_same(study, parts.config)
    attrs = study.user_attrs
    if attrs.get(records.VERSION, __version__) != __version__:
        raise StudyError(
            f"study {parts.config.name!r} was begun with adopt {attrs.get(records.VERSION)}, this is {__version__}; "
            f"install that version to go on, or start another with --set name=NEW"
        )
    for key, value in _identity(parts).items():
        if attrs.get(key, value) != value:
            raise StudyError(
                f"study {parts.config.name!r} was begun with another {key} ({attrs.get(key)} -> {value}); "
                "its values cannot be compared with new ones; start another with --set name=NEW"
            )


def full_steps(parts: Parts) -> int:
    """Number of steps whose cost, with every layer on and the first of the solvers, is 1.0."""
    return parts.config.search.cost_steps or parts.space.max_steps


def relative_cost(parts: Parts, candidate: Candidate) -> float:
    """Cost of a candidate, 1.0 being ``full_steps`` steps with every layer on."""
    return parts.space.cost(candidate) / len(parts.space.visits(full_steps(parts), {}))


def metric_name(parts: Parts) -> str:
    """How the value is called in print: FID for Inception alone, else FD or KID with the extractor's name."""
    extractor = parts.evaluator.extractor
    if parts.config.score.metric == "kid":
        return f"KID({extractor.name})"
    return "FID" if extractor.metric == "FID" else f"FD({extractor.name})"


def _too_few(parts: Parts, images: int) -> str | None:
    return too_few(images, len(parts.evaluator.reference.mu)) if parts.config.score.metric == "frechet" else None


def warnings(parts: Parts, images: int) -> list[str]:
    """What to know about distances of so many images in this study, a line each; none where there is nothing."""
    few = _too_few(parts, images)
    slow = parts.model.device.type == "cpu" and parts.config.model.precision != "float32"
    reduced = (
        f"model.precision {parts.config.model.precision!r} is mostly slower than float32 on a CPU" if slow else None
    )
    reference = parts.evaluator.reference
    doubtful = doubts(reference, parts.model.picture_shape, parts.config.score.metric)
    return [line for line in (*parts.model.notes, *parts.sanity, *reference.notes, *doubtful, few, reduced) if line]


def work(
    parts: Parts,
    study: optuna.Study,
    storage: StudyStorage,
    on_trial: OnTrial | None = None,
    store: ArtifactStore | None = None,
) -> None:
    """Evaluate candidates until the budget is met, beside any other workers of the study.

    ``store``: where pictures of notable trials go. Ctrl-C puts the running trial back in the queue and is re-raised.
    """
    search = parts.config.search
    failures, idle, tell_seconds = 0, FIRST_WAIT, 0.0
    take = partial(claim, study, storage, search.trials, partial(_template, parts, study), grace=search.grace)
    take = partial(take, complete=partial(_completed, parts, study))
    parts.sampler.read(study)  # a long study is read before others have to wait for it
    with Heart(storage, search.grace / BEATS) as heart, _leaving(study, storage):
        while True:
            started = time.perf_counter()
            claimed = take(ready=partial(_ready, parts))
            if claimed == "done":
                return
            if claimed == "wait":
                time.sleep(idle)
                idle = min(2 * idle, LONGEST_WAIT)
                continue
            idle = FIRST_WAIT
            storage_seconds = time.perf_counter() - started + tell_seconds
            try:
                with heart.beating_for(claimed.id), _failed_if_broken(storage, claimed.id):
                    outcome = _evaluate(parts, claimed, store)
            except UpdateFinishedTrialError:
                continue  # it was silent too long, and another worker has finished the trial: it counts once
            _note_runtime(parts, study)
            telling = time.perf_counter()
            counts = _finish(storage, claimed, outcome, storage_seconds)
            tell_seconds = time.perf_counter() - telling
            if not counts:
                continue
            failures = failures + 1 if outcome.state == TrialState.FAIL else 0
            if failures >= MAX_FAILURES:
                raise StudyError(f"the last {failures} trials failed ({outcome.reason}); mend the cause and run again")
            if on_trial is not None:
                trials = study.get_trials(deepcopy=False)
                finished = sum(trial.state in records.FINISHED for trial in trials)
                on_trial(Progress(trials[claimed.number], finished, time.perf_counter() - started))


def _note_runtime(parts: Parts, study: optuna.Study) -> None:
    """Keep what a trial was computed with, where it is not what the study's first one was: bits may differ."""
    now, attrs = describe_runtime(parts.evaluator), study.user_attrs
    first, key = attrs.get(records.RUNTIME), records.runtime_key(now)
    if now == first or key in attrs:
        return
    memory_ran_out = first and {**first, "batch": now["batch"]} == now and not records.finished(study)
    if not first or memory_ran_out:  # of a study begun before this was kept, or in the very first trial
        study.set_user_attr(records.RUNTIME, now)
        return
    study.set_user_attr(key, now)
    for line in records.runtime_warnings({records.RUNTIME: first, key: now}):
        _log.warning(line)


@contextmanager
def _leaving(study: optuna.Study, storage: StudyStorage) -> Iterator[None]:
    """A worker that is stopped puts its trial back in the queue, also one that it was about to begin or to end."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_mine(trial):
                put_back(storage, trial._trial_id)
        raise


@contextmanager
def _failed_if_broken(storage: StudyStorage, trial_id: int) -> Iterator[None]:
    """A trial that breaks its worker is failed with the reason."""
    try:
        yield
    except (OptunaError, SQLAlchemyError):
        raise  # the database's fault: the trial is taken back later
    except Exception as error:
        reason = {FAILURE: _one_line(f"{type(error).__name__}: {error}")}
        storage.finish_trial(trial_id, TrialState.FAIL, None, reason, (OWNER, owner()))
        raise


def _template(parts: Parts, study: optuna.Study, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial after ``trials`` as it begins: what it tries, where that came from, and who runs it."""
    number = len(trials)
    proposal = parts.sampler.proposal(study, number, trials)
    return _begun(parts, proposal.candidate, parts.sampler.describe(study, number))


def _completed(
    parts: Parts, study: optuna.Study, waiting: FrozenTrial, trials: Sequence[FrozenTrial]
) -> FrozenTrial | None:
    """What a waiting trial gets as it is taken: all that a new one says of itself. None where it has said it before."""
    attrs = waiting.user_attrs
    if "fixed_params" not in waiting.system_attrs and {records.CANDIDATE, records.COST, records.STAGE} <= attrs.keys():
        return None
    try:
        candidate = parts.sampler.enqueued(study, waiting)
    except ConfigError as error:
        return optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={FAILURE: _one_line(str(error))})
    parts.sampler.proposal(study, waiting.number, trials)
    return _begun(parts, candidate, parts.sampler.describe(study, waiting.number))


def _begun(parts: Parts, candidate: Candidate, origin: dict[str, Any]) -> FrozenTrial:
    """A trial of this worker as it begins, all of it."""
    params, distributions = parts.space.encode(candidate), parts.space.distributions()
    return optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions={name: distributions[name] for name in params},
        user_attrs={
            OWNER: owner(),
            records.CANDIDATE: candidate.key,
            records.COST: relative_cost(parts, candidate),
            **origin,
        },
    )


def _ready(parts: Parts, trials: Sequence[FrozenTrial]) -> bool:
    """With ``search.barrier``: whether all generations before that of the next trial are finished."""
    if not parts.config.search.barrier:
        return True
    alive = [t for t in trials if t.state != TrialState.FAIL]
    size = parts.sampler.settings.population_size
    return all(t.state.is_finished() for t in alive[: len(alive) // size * size])


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: its state, its score where it has one, and the reason where it failed."""

    state: TrialState
    score: Score | None = None
    reason: str | None = None


def _evaluate(parts: Parts, claimed: Claim, store: ArtifactStore | None) -> Outcome:
    """Score one trial; a candidate that cannot be scored is a failed trial, not the end of the run."""
    try:
        candidate = _candidate(claimed)
        on_rung = None if parts.config.score.pruner == "none" else _reporter(claimed)  # nobody asks for its one rung
        score = parts.evaluator.score(candidate, rungs(parts.config), on_rung=on_rung, preview=PICTURES if store else 0)
        if not math.isfinite(score.value):
            raise StatisticsError(f"the distance is {score.value}")
    except (AdoptError, torch.OutOfMemoryError, MemoryError) as error:
        return Outcome(TrialState.FAIL, reason=_one_line(str(error) or "out of memory"))
    if store is not None and score.complete:
        _keep_picture(claimed, score, store)
    return Outcome(TrialState.COMPLETE if score.complete else TrialState.PRUNED, score)


def _candidate(claimed: Claim) -> Candidate:
    """What a trial tries (ConfigError where what it was enqueued with is no candidate)."""
    attrs = claimed.begun.user_attrs
    if FAILURE in attrs:
        raise ConfigError(attrs[FAILURE])
    return Candidate.from_key(attrs[records.CANDIDATE])


def _keep_picture(claimed: Claim, score: Score, store: ArtifactStore) -> None:
    """Attach a picture of a notable trial's images, as long as it runs here: a finished one takes no artifacts."""
    assert score.preview is not None
    trials = claimed.study.get_trials(deepcopy=False)
    now = trials[claimed.number]
    why = notable(trials, claimed.number, score.value, now.user_attrs)
    if why is not None and is_mine(now):
        attach_picture(claimed.trial, store, score.preview.numpy(), why)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _finish(storage: StudyStorage, claimed: Claim, outcome: Outcome, storage_seconds: float) -> bool:
    """Write down how a trial ended; False where another worker has taken it over meanwhile, and it counts once.

    ``storage_seconds``: what taking it and ending the one before it took.
    """
    score = outcome.score
    attrs: dict[str, Any] = {} if outcome.reason is None else {FAILURE: outcome.reason}
    if score is not None:
        attrs |= {records.rung_key(images): value for images, value in score.rungs[:-1]}
        attrs[records.IMAGES] = score.images
        attrs[records.SCORE] = {**score.to_json(), "seconds_storage": round(storage_seconds, 4)}
    values = None if score is None else [score.value]
    return storage.finish_trial(claimed.id, outcome.state, values, attrs, (OWNER, owner()))


def rungs(config: StudyConfig) -> list[int]:
    """Image counts at which a candidate is scored, the last one being its value's."""
    if config.score.pruner == "none":
        return [config.score.images]
    return [*config.score.rungs, config.score.images]


def _reporter(claimed: Claim) -> Callable[[int, float], bool]:
    """Reports each rung's value to Optuna and asks its pruner whether to go on."""
    # A trial that was cut short and is run again has passed every rung below the last one it reported.
    reported = claimed.begun.intermediate_values
    passed = max(reported, default=0)

    def on_rung(images: int, value: float) -> bool:
        if images not in reported:
            claimed.trial.report(value, step=images)
        return images < passed or not claimed.trial.should_prune()

    return on_rung


def winner(study: optuna.Study) -> FrozenTrial:
    """The best complete trial, the earlier one of equals (StudyError where there is none)."""
    complete = records.scored(study.get_trials(deepcopy=False))
    if not complete:
        raise StudyError(
            f"study {study.study_name!r} has no finished trial yet; run it first: adopt run --study {study.study_name}"
        )
    return min(complete, key=lambda trial: (trial.value, trial.number))


def score_fresh(parts: Parts, study: optuna.Study, candidate: Candidate, images: int, banks: int) -> records.Fresh:
    """Score a candidate on ``banks`` banks of noise that the search never saw, and store the values.

    A score that is already stored for the same number of images and banks is returned as it is.
    """
    stored = records.fresh(study.user_attrs, candidate.key, images, banks)
    if stored is not None:
        return stored
    values = tuple(parts.evaluator.score(candidate, [images], bank=bank).value for bank in range(1, banks + 1))
    _note_runtime(parts, study)
    scored = records.Fresh(images, values, _too_few(parts, images))
    study.set_user_attr(records.fresh_key(candidate.key, images, banks), scored.to_json())
    return scored


def finalists(parts: Parts, study: optuna.Study) -> dict[str, Candidate]:
    """What a finished study scores on fresh noise: uniform, the best other known schedule, and the winner.

    The winner comes last: once it has its score, all have.
    """
    best = Candidate.from_key(winner(study).user_attrs[records.CANDIDATE])
    found = {"uniform": parts.known["uniform"]}
    values = records.values_by_key(study)
    scored = {name: values[c.key] for name, c in parts.known.items() if c.key in values and name != "uniform"}
    if scored:
        name = min(scored, key=lambda name: scored[name])
        found[name] = parts.known[name]
    return {**found, "best": best}


def score_finalists(parts: Parts, study: optuna.Study, on_score: Callable[[str, int, int], None] | None = None) -> None:
    """Score all ``finalists`` on the config's fresh banks; ``on_score`` is told (name, done, all)."""
    images, banks = parts.config.score.fresh_images, parts.config.score.fresh_banks
    candidates = finalists(parts, study)
    for done, (name, candidate) in enumerate(candidates.items(), 1):
        score_fresh(parts, study, candidate, images, banks)
        if on_score is not None:
            on_score(name, done, len(candidates))


def sample_rows(parts: Parts, study: optuna.Study, images: int, many_steps: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """Labelled rows of samples from the same fresh noises: uniform, best found, and uniform with many steps.

    Arrays are uint8 [images, C, H, W].
    """
    best = Candidate.from_key(winner(study).user_attrs[records.CANDIDATE])
    T = parts.model.schedule.T
    if many_steps > T:
        raise ConfigError(f"--many-steps {many_steps} is more than the model's {T} timesteps; give {T} or fewer")
    many = Candidate(KNOWN["uniform"](parts.model.schedule, many_steps))
    uniform = parts.known["uniform"]
    rows = {f"uniform, {uniform.steps} steps": uniform, f"adopt, {best.steps} steps": best}
    rows[f"uniform, {many_steps} steps"] = many
    return [(label, parts.evaluator.sample(c, 0, images, bank=1).cpu().numpy()) for label, c in rows.items()]
