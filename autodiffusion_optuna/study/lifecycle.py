"""A study is created, or resumed after checking that it measures the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, PercentilePruner
from optuna.trial import TrialState
from torch import Tensor

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import StudyConfig
from autodiffusion_optuna.errors import StudyError
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.runtime import describe_runtime
from autodiffusion_optuna.search.race import RacePruner
from autodiffusion_optuna.storage.artifacts import (
    ArtifactStore,
    check_store,
    default_folder,
    location_of,
    open_store,
    stored_location,
)
from autodiffusion_optuna.storage.attrs import (
    ARTIFACTS,
    BASELINE,
    BASELINE_COSTS,
    BASELINE_KEYS,
    CODEC,
    CONDITIONS,
    CONFIG,
    EXTRACTOR,
    METRIC,
    MODEL,
    MODEL_FACTS,
    NOISE,
    READY,
    REFERENCE,
    REFERENCE_IMAGES,
    RUNTIME,
    SANITY,
    START_COSTS,
    START_SECONDS,
    STARTS,
    UNIT_COSTS,
    VERSION,
    WARNINGS,
)
from autodiffusion_optuna.storage.database import check_place, open_storage
from autodiffusion_optuna.storage.studies import (
    find_study,
    require_files,
    require_same,
    stored_batch,
    stored_unit_costs,
)
from autodiffusion_optuna.storage.study_storage import LOCK_SECONDS, StudyStorage
from autodiffusion_optuna.study.components import (
    ImageComponents,
    StudyComponents,
    build,
    metric_name,
    relative_cost,
    warnings,
)
from autodiffusion_optuna.study.starts import Say, compute_starts, plan_starts, screen_costs, with_baselines

BEGIN_SECONDS = 3600.0
"""Time for whoever begins a study to compute its starts, which on a large model takes many minutes."""


def open_study(
    components: StudyComponents, storage: StudyStorage, pictures: str | None = None, say: Say | None = None
) -> optuna.Study:
    """Create the study, or resume it after checking that it measures the same.

    ``pictures``: where a new study keeps them, as it is stored. ``say``: what tells the user that starts are being
    computed. Raises StudyError with the differences where it does not.
    """
    study = optuna.create_study(
        study_name=components.config.name,
        storage=storage,
        sampler=components.sampler,
        pruner=_pruner(components.config, components.sampler.settings.population_size),
        direction="minimize",
        load_if_exists=True,
    )
    ready = READY in study.user_attrs
    patience = LOCK_SECONDS if ready else BEGIN_SECONDS
    # Of workers that start together one begins it, the others find it begun.
    with storage.locked(study, patience, beginning=not ready):
        begun = READY in study.user_attrs
        if not begun and study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE)):
            raise StudyError(f"study {study.study_name!r} exists but was not made by adopt; choose another name")
        if CONFIG in study.user_attrs:  # also where whoever began it was stopped: its queue is of that config
            check_same(components, study)
        if not begun:
            _begin(components, study, pictures, say)
    if begun:
        _describe_run(components, study)
    # Those that the study was begun with: another machine may round a closed form otherwise.
    baselines = with_baselines(components, study.user_attrs[BASELINE_KEYS]).baselines
    components.sampler.offer(baselines[name] for name in components.offered)
    return study


@dataclass(frozen=True, eq=False)
class Run:
    """A study that is ready to be worked on."""

    components: StudyComponents
    study: optuna.Study
    storage: StudyStorage
    store: ArtifactStore | None


class Prepared(NamedTuple):
    """A study that could be created or resumed: its components, itself if it is begun, and where its pictures go."""

    components: StudyComponents
    begun: optuna.Study | None
    pictures: str | None


def prepare_run(
    config: StudyConfig,
    url: str,
    *,
    trust: bool = False,
    artifacts: str | None = None,
    device: str | None = None,
    known: bool = False,
    model: Model | None = None,
    images: Tensor | None = None,
) -> Prepared:
    """All that comes before a study is written, with the parameters of ``open_run``; nothing is.

    What is quickly checked comes first: the database, the places of pictures and files, then the model.
    """
    check_place(url)
    begun = find_study(url, config.name, known=known)
    if begun is not None:
        require_same(begun, config)
        require_files(begun, config)
    location = _location(begun, url, artifacts)
    if location is not None:
        check_store(location_of(location, url))
    components = build(
        config,
        trust=trust,
        unit_costs=stored_unit_costs(begun),
        device=device,
        batch=stored_batch(begun),
        model=model,
        images=images,
    )
    if begun is not None:
        check_same(components, begun)
        components = with_baselines(components, begun.user_attrs.get(BASELINE_KEYS, {}))
    components.evaluator.prepare(0, config.score.images)  # prompts too many for this machine are refused here
    return Prepared(components, begun, location)


def open_run(
    config: StudyConfig,
    url: str,
    *,
    trust: bool = False,
    artifacts: str | None = None,
    device: str | None = None,
    known: bool = False,
    model: Model | None = None,
    images: Tensor | None = None,
    say: Say | None = None,
) -> Run:
    """Build a study's components, and create or resume it at ``url``.

    ``artifacts``: where its pictures go, as ``artifacts.open_store`` takes it; None leaves that as it is, or for a new
    study in SQLite beside the database. ``device``: this worker's, instead of the config's. ``known``: whether the
    database has answered before; it is then waited for. ``say``: see ``open_study``.
    ``model``, ``images``: see ``components.build``. Raises AdoptError children before anything is written but the name
    of a new study.
    """
    components, begun, location = prepare_run(
        config,
        url,
        trust=trust,
        artifacts=artifacts,
        device=device,
        known=known,
        model=model,
        images=images,
    )
    store = None if location is None else open_store(location_of(location, url))
    storage = open_storage(url, known=True)  # it answered a moment ago
    study = open_study(components, storage, location, say)
    components = with_baselines(components, study.user_attrs[BASELINE_KEYS])
    batch = stored_batch(study)
    if batch is not None and begun is None:  # another worker that started together with this one has begun the study
        components = replace(components, evaluator=replace(components.evaluator, batch=batch))
    if location is not None and location != study.user_attrs.get(ARTIFACTS):
        study.set_user_attr(ARTIFACTS, location)
    return Run(components, study, storage, store)


def _location(begun: optuna.Study | None, url: str, given: str | None) -> str | None:
    """Where pictures go, as it is stored."""
    if given is not None:
        return stored_location(given, url)
    kept = None if begun is None else begun.user_attrs.get(ARTIFACTS)
    location = default_folder(url) if begun is None else kept and location_of(kept, url)
    return None if location is None else stored_location(location, url)


def _model_facts(model: Model) -> dict[str, Any]:
    """What an export needs to know of the model."""
    return {
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


def _pruner(config: StudyConfig, population: int) -> BasePruner:
    if config.pruner == "race":
        # With a barrier any number of workers finds the same candidates, so it decides who is stopped as well.
        return RacePruner(generation=population if config.search.barrier else None)
    startup = config.search.population or 10
    if config.score.pruner == "percentile":
        return PercentilePruner(100 * config.score.keep, n_startup_trials=startup)
    if config.score.pruner == "median":
        return MedianPruner(n_startup_trials=startup)
    return NopPruner()


def _identity(components: StudyComponents | ImageComponents) -> dict[str, Any]:
    """What must be equal for values, or images alone, to be compared, besides the config; stored with the study."""
    conditions = components.model.conditions
    found = {
        CODEC: components.space.codec(),
        MODEL: components.model.fingerprint,
        CONDITIONS: None if conditions is None else conditions.fingerprint,
    }
    if isinstance(components, StudyComponents):
        found[EXTRACTOR] = components.evaluator.extractor.fingerprint
        found[REFERENCE] = components.evaluator.reference.digest
    return found


def _describe_run(components: StudyComponents, study: optuna.Study) -> None:
    """Write what is so in this run: a longer budget, where files are now, and what there is to be warned of."""
    study.set_user_attr(CONFIG, components.config.model_dump(mode="json"))
    study.set_user_attr(WARNINGS, warnings(components, components.config.score.images))
    if components.config.model.check:  # else what an earlier check found stays true
        study.set_user_attr(SANITY, list(components.sanity))
    study.set_user_attr(REFERENCE_IMAGES, components.evaluator.reference.n)


def _begin(components: StudyComponents, study: optuna.Study, pictures: str | None, say: Say | None) -> None:
    """Write what the study is and enqueue the baselines; may be killed anywhere and repeated."""
    computed = _compute_baselines(components, study, say)  # first: where memory runs out, nothing is written yet
    _describe_run(components, study)
    if pictures is not None:
        study.set_user_attr(ARTIFACTS, pictures)
    attrs = {
        **_identity(components),
        MODEL_FACTS: _model_facts(components.model),
        NOISE: components.model.schedule.pack(),
        RUNTIME: describe_runtime(components.evaluator),
        VERSION: __version__,
        METRIC: metric_name(components),
        UNIT_COSTS: {"skip": list(components.space.unit_costs), "reuse": list(components.space.reuse_costs)},
        **computed,
    }
    for name, value in attrs.items():
        study.set_user_attr(name, value)
    components = with_baselines(components, study.user_attrs[BASELINE_KEYS])
    starts: dict[str, str] = {}
    for name in components.warm_starts:
        if name in components.baselines and name not in components.offered:  # else it could not be computed
            starts.setdefault(components.baselines[name].key, name)  # two names may mean the same list
    enqueued = len(study.get_trials(deepcopy=False))
    for key, name in list(starts.items())[enqueued:]:
        params = components.space.encode(Candidate.from_key(key))
        study.enqueue_trial(params, user_attrs={BASELINE: name})
    study.set_user_attr(READY, True)


def _compute_baselines(components: StudyComponents, study: optuna.Study, say: Say | None) -> dict[str, Any]:
    """Attrs of all baselines, ``BASELINE_KEYS`` last; none where a beginning that was cut off has stored them."""
    if BASELINE_KEYS in study.user_attrs:
        return {}
    plan, found, costs, seconds = plan_starts(components), components.baselines, screen_costs(components), 0.0
    if plan is not None:
        if say is not None:
            say(plan.line(sum(costs.values())))
        starts = compute_starts(components, plan)
        found, seconds = {**starts.candidates, **found}, starts.seconds
        costs |= starts.costs
    spent = {START_COSTS: costs, START_SECONDS: {STARTS: seconds}} if costs else {}
    return {
        **spent,
        BASELINE_COSTS: {name: relative_cost(components, candidate) for name, candidate in found.items()},
        BASELINE_KEYS: {name: candidate.key for name, candidate in found.items()},
    }


def check_same(components: StudyComponents | ImageComponents, study: optuna.Study) -> None:
    """StudyError naming what differs where new values could not be compared with the study's."""
    require_same(study, components.config)
    attrs = study.user_attrs
    if attrs.get(VERSION, __version__) != __version__:
        raise StudyError(
            f"study {components.config.name!r} was begun with adopt {attrs.get(VERSION)}, this is {__version__}; "
            f"install that version to go on, or start another with --set name=NEW"
        )
    for key, value in _identity(components).items():
        if attrs.get(key, value) != value:
            raise StudyError(
                f"study {components.config.name!r} was begun with another {key} ({attrs.get(key)} -> {value}); "
                "its values cannot be compared with new ones; start another with --set name=NEW"
            )
