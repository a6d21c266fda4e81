"""Reads a study and says what it found. Needs Optuna, never torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from autodiffusion_optuna import __version__, records
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.claims import Worker, workers
from autodiffusion_optuna.config import (
    SEARCH_BANK,
    StudyConfig,
    differences,
    explain,
    flatten,
    load_config,
    missing_files,
    presets,
)
from autodiffusion_optuna.errors import StudyError, choose_from
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.storage import StudyStorage, is_empty, open_storage

PHASES = ("network", "features", "distance", "storage")
LOST_VARIETY = -0.2
"""log of the variance of features over the reference's below which the best schedule is worth a look."""
FIRST = {records.GENERATION: 0, records.STAGE: 1}


@dataclass(frozen=True, eq=False)
class Known:
    """A known schedule beside the search's: its value if it was a trial, and its fresh score if it has one."""

    name: str
    candidate: Candidate
    cost: float
    value: float | None
    fresh: records.Fresh | None


@dataclass(frozen=True, eq=False)
class Best:
    """The best complete trial."""

    trial: int
    candidate: Candidate
    value: float
    cost: float
    trace_ratio: float | None
    """log of the variance of its features over the reference's; well below 0 it has lost variety."""
    fresh: records.Fresh | None


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table of schedules."""

    name: str
    candidate: Candidate
    cost: float
    value: float | None
    fresh: records.Fresh | None


@dataclass(frozen=True, eq=False)
class StudyReport:
    """All that ``adopt show`` prints of one study. ``attrs``: the study's user attributes, see ``records``."""

    config: StudyConfig
    metric: str
    units: tuple[str, ...]
    trials: list[FrozenTrial]
    best: Best | None
    known: list[Known]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def noise(self) -> NoiseSchedule | None:
        """The model's noise schedule; None in studies begun by a version that did not store it."""
        packed = self.attrs.get(records.NOISE)
        return None if packed is None else NoiseSchedule.unpack(packed)

    @property
    def value_name(self) -> str:
        """What the value of every candidate is: the metric, and the images it was measured on."""
        return f"{self.metric}, {self.config.score.images:,} images"

    @property
    def trial_value_name(self) -> str:
        """What a trial's value is, that of a pruned one too."""
        return self.value_name + ("" if self.config.score.pruner == "none" else ", fewer where pruned")

    @property
    def reference_name(self) -> str:
        """Where the reference comes from, and how many images are behind it."""
        images = self.attrs.get(records.REFERENCE_IMAGES)
        count = "of an unknown number of images" if images is None else f"of {images:,} images"
        path = self.config.score.reference
        return f"{'bundled with the model' if path is None else Path(path).name}, {count}"

    @property
    def fresh_size(self) -> tuple[int, int] | None:
        """(images, banks) of the fresh values on the most images; another schedule's may be of fewer."""
        return max((row.fresh.size for row in self.rows() if row.fresh is not None), default=None)

    def compared(self) -> tuple[Row, Row] | None:
        """The best found and uniform, their fresh values on the same images or left out; None where one is missing."""
        rows = self.rows()
        uniform = next((row for row in rows if row.name == "uniform"), None)
        if uniform is None:
            return None
        pair = rows[0], uniform
        if rows[0].fresh and uniform.fresh and rows[0].fresh.size == uniform.fresh.size:
            return pair
        size = records.largest_fresh(self.attrs, *(row.candidate.key for row in pair))
        best, uniform = (
            replace(row, fresh=size and records.fresh(self.attrs, row.candidate.key, *size)) for row in pair
        )
        return best, uniform

    def warnings(self, tail: str = "") -> list[str]:
        """Everything to know before a value of the study is quoted, a line each: what ``adopt run`` said, and more.

        ``tail``: what commands in them end with, such as `` --storage URL``.
        """
        stored = [*(self.attrs.get(records.SANITY) or []), *(self.attrs.get(records.WARNINGS) or [])]
        return list(dict.fromkeys([*stored, *records.runtime_warnings(self.attrs), *self.found_doubtful(tail)]))

    def found_doubtful(self, tail: str = "") -> list[str]:
        """Those of ``warnings`` that only the trials and the fresh values show."""
        fresh = self.best.fresh.warning if self.best and self.best.fresh else None
        return [*([fresh] if fresh else []), *_variety_warning(self.best), *self._fewer_images(tail)]

    def _fewer_images(self, tail: str) -> list[str]:
        """A line where a schedule was scored on more images than the best one."""
        if self.best is None or self.fresh_size is None:
            return []
        own = self.best.fresh.size if self.best.fresh else None
        if own == self.fresh_size:
            return []
        images, banks = self.fresh_size
        has = f"only {banks_of(own)}" if own else "none"
        return [
            f"other schedules were scored on {banks_of(self.fresh_size)} fresh images, the best found on {has}; score "
            f"it too: adopt score --study {self.config.name} --images {images} --banks {banks}{tail}"
        ]

    def rows(self) -> list[Row]:
        """The best found, then the known schedules from best to worst; nothing where no candidate is finished."""
        if self.best is None:
            return []
        best = Row("best found", self.best.candidate, self.best.cost, self.best.value, self.best.fresh)
        known = sorted(self.known, key=lambda k: float("inf") if k.value is None else k.value)
        return [best, *(Row(k.name, k.candidate, k.cost, k.value, k.fresh) for k in known)]

    @property
    def finished(self) -> list[FrozenTrial]:
        """Complete and pruned trials by number."""
        return [t for t in self.trials if t.state in records.FINISHED]

    @property
    def last_origin(self) -> dict[str, Any]:
        """Generation and stage of the latest trial that has both."""
        known = [t.user_attrs for t in self.trials if FIRST.keys() <= t.user_attrs.keys()]
        return {key: known[-1][key] for key in FIRST} if known else FIRST

    @property
    def solver(self) -> str | list[str]:
        """The solver of all candidates, or those that were searched."""
        return self.config.sampling.solver

    def total(self, field: str) -> float:
        """Sum of one field of the finished trials' scores."""
        return float(sum(records.score(t).get(field, 0) for t in self.finished))

    @property
    def wall_seconds(self) -> float:
        """Seconds from ask to tell, summed over finished trials."""
        return sum(t.duration.total_seconds() for t in self.finished if t.duration is not None)

    def best_by_generation(self) -> list[tuple[int, int, float | None]]:
        """(generation, stage, best value so far) of every generation; None before the first complete candidate."""
        history: dict[int, tuple[int, float | None]] = {}
        best = float("inf")
        for trial in self.finished:
            attrs = {**FIRST, **trial.user_attrs}
            if trial.state == TrialState.COMPLETE and trial.values:
                best = min(best, trial.values[0])
            history[records.generation(trial)] = (attrs[records.STAGE], best if math.isfinite(best) else None)
        return [(generation, stage, value) for generation, (stage, value) in sorted(history.items())]

    def to_json(self, tail: str = "") -> dict[str, Any]:
        """The object that ``adopt show --json`` prints; scripts may rely on its keys.

        ``tail`` as in ``warnings``.
        """
        return {
            "study": self.config.name,
            "finished": len(self.finished),
            "budget": self.config.search.trials,
            "generation": self.last_origin["generation"],
            "stage": self.last_origin["stage"],
            "solver": self.solver,
            "metric": self.metric,
            "extractor": self.config.score.extractor,
            "images": self.config.score.images,
            "bank": SEARCH_BANK,
            "seed": self.config.score.seed,
            "reference_images": self.attrs.get(records.REFERENCE_IMAGES),
            "warnings": self.warnings(tail),
            "best": None if self.best is None else self._best_json(self.best),
            "known": [
                {
                    "name": known.name,
                    "timesteps": list(known.candidate.timesteps),
                    "settings": known.candidate.settings_dict,
                    "value": known.value,
                    **self._measured_on,
                    "fresh": None if known.fresh is None else known.fresh.summary(),
                }
                for known in self.known
            ],
            "evaluations": {"run": int(self.total("run")), "saved": int(self.total("saved"))},
            "seconds": {
                **{phase: round(self.total(f"seconds_{phase}"), 3) for phase in PHASES},
                "total": round(self.wall_seconds, 3),
            },
        }

    @property
    def _measured_on(self) -> dict[str, int]:
        return {"images": self.config.score.images, "bank": SEARCH_BANK}

    def _best_json(self, best: Best) -> dict[str, Any]:
        return {
            "trial": best.trial,
            "timesteps": list(best.candidate.timesteps),
            "skips": best.candidate.skip_names(self.units),
            "settings": best.candidate.settings_dict,
            "variance_ratio": None if best.trace_ratio is None else round(math.exp(best.trace_ratio), 6),
            "value": best.value,
            **self._measured_on,
            "cost": best.cost,
            "fresh": None if best.fresh is None else best.fresh.summary(),
        }


def banks_of(size: tuple[int, int]) -> str:
    """(images, banks) as it is shown everywhere: banks x images."""
    return f"{size[1]} x {size[0]:,}"


def _variety_warning(best: Best | None) -> list[str]:
    """A warning where the best schedule may owe its value to images that are too much alike."""
    ratio = best.trace_ratio if best else None
    if ratio is None or ratio > LOST_VARIETY:
        return []
    share = math.exp(ratio)
    return [f"the features of the best schedule's images have {share:.0%} of the reference's variance; look at samples"]


def load_study(storage: StudyStorage, name: str) -> optuna.Study:
    """An existing study made by adopt (StudyError listing those there are)."""
    names = study_names(storage)
    if name not in names:
        if not names:
            raise StudyError(f"no study {name!r}: the database holds none yet; start one with adopt run --study {name}")
        raise StudyError(choose_from("study", name, names))
    study = optuna.load_study(study_name=name, storage=storage)
    if records.CONFIG not in study.user_attrs:
        if study.user_attrs or study.get_trials(deepcopy=False):
            raise StudyError(f"study {name!r} was not made by adopt; choose another")
        raise StudyError(
            f"study {name!r} is empty: it was not made by adopt, or whoever began it was stopped; choose another, or "
            "run it again as it was begun, with its study file or preset"
        )
    return study


def peek_storage(url: str, *, known: bool = False) -> StudyStorage | None:
    """The database at ``url``, or None where there is none yet: looking never creates one. ``known``: it was there."""
    return None if is_empty(url, known=known) else open_storage(url, create=False, known=known)


def peek(url: str, name: str, *, known: bool = False, ready: bool = True) -> optuna.Study | None:
    """A study made by adopt, or None where the database or the study does not exist or was never begun in full.

    ``known``: whether the database has answered before; it is then waited for. ``ready`` False: one whose beginning
    was cut off will do, if it says what it is.
    """
    storage = peek_storage(url, known=known)
    if storage is None or name not in study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    needed = {records.CONFIG, records.READY} if ready else {records.CONFIG}
    return study if needed <= study.user_attrs.keys() else None


def existing_names(url: str) -> list[str]:
    """Names of the studies in the database at ``url``, if there is one."""
    storage = peek_storage(url)
    return study_names(storage) if storage else []


def require_same(study: optuna.Study, config: StudyConfig) -> None:
    """StudyError with the differences where a config measures something else than the study does."""
    changed = differences(stored_config(study), config)
    if changed:
        raise StudyError(
            f"study {config.name!r} was begun with other settings ({'; '.join(changed)}); "
            "run it with the old ones, or start another with --set name=NEW"
        )


def require_files(study: optuna.Study, config: StudyConfig) -> None:
    """StudyError where a file of a study that was begun elsewhere does not exist here, with what gives its place."""
    missing = missing_files(config)
    if missing:
        settings = flatten(config.model_dump(mode="json"))
        where = " and ".join(f"{key} = {settings[key]!r}" for key in missing)
        places = " ".join(f"--set {key}=PATH" for key in missing)
        raise StudyError(f"study {config.name!r} has {where}, not to be found here; say where it is now: {places}")


def stored_unit_costs(study: optuna.Study | None) -> tuple[float, ...] | None:
    """Cost shares of the units as they were when the study was begun; measured latencies are not measured again."""
    costs = None if study is None else study.user_attrs.get(records.UNIT_COSTS)
    return None if costs is None else tuple(costs)


def stored_batch(study: optuna.Study | None) -> int | None:
    """Images in one network evaluation when the study was begun; another batch computes other bits."""
    return None if study is None else (study.user_attrs.get(records.RUNTIME) or {}).get("batch")


def study_names(storage: StudyStorage) -> list[str]:
    """Names of all studies in a database."""
    return sorted(study.study_name for study in storage.get_all_studies())


def current_name(study: optuna.Study) -> str:
    """The study's name as it is now: others may have renamed it since it was opened (KeyError where it is deleted)."""
    storage = getattr(study._storage, "_backend", study._storage)  # Optuna's cache never asks for a name twice
    return str(storage.get_study_name_from_id(study._study_id))


def is_deleted(study: optuna.Study) -> bool:
    """Whether a study that was opened is gone."""
    try:
        current_name(study)
    except KeyError:
        return True
    return False


@contextmanager
def still_there(study: optuna.Study) -> Iterator[None]:
    """StudyError where others delete the study meanwhile, of which Optuna says KeyError."""
    try:
        yield
    except KeyError:
        if not is_deleted(study):
            raise
        raise StudyError(f"study {study.study_name!r} was deleted meanwhile, with all that it had found") from None


def stored_config(study: optuna.Study) -> StudyConfig:
    """The config a study was last run with, under the study's present name.

    optuna-dashboard's rename and Optuna's ``copy_study`` leave the old name in the config, and may choose one that no
    study file could have: the name is not checked. StudyError for a config that only another version of adopt reads.
    """
    attrs, name = study.user_attrs, current_name(study)
    try:
        return StudyConfig.model_validate(attrs[records.CONFIG]).model_copy(update={"name": name})
    except ValidationError as error:
        reason = explain(error).partition(";")[0]
        raise StudyError(
            f"study {name!r} was written by adopt {attrs.get(records.VERSION)}, this is {__version__}: {reason}; "
            "install that version to go on with it, or choose another study"
        ) from None


def read_report(study: optuna.Study, size: tuple[int, int] | None = None) -> StudyReport:
    """Everything about a study that can be read without its model.

    ``size``: (images, banks) of the fresh values to show; None: each schedule's on the most images.
    """
    attrs = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    values = {  # of the trials just read: a running study has others a moment later
        t.user_attrs[records.CANDIDATE]: t.values[0] for t in _scored(trials, attrs)
    }
    best = _best(trials, attrs, size)
    costs = attrs.get(records.KNOWN_COSTS, {})
    known = [
        Known(
            name,
            Candidate.from_key(key),
            costs[name],
            values.get(key),
            _fresh(attrs, key, size),
        )
        for name, key in attrs.get(records.KNOWN, {}).items()
        if name in costs
    ]
    return StudyReport(
        config=stored_config(study),
        metric=attrs.get(records.METRIC, "value"),
        units=tuple(attrs.get("codec", {}).get("units", ())),
        trials=trials,
        best=best,
        known=known,
        attrs=attrs,
    )


def _best(trials: Sequence[FrozenTrial], attrs: dict[str, Any], size: tuple[int, int] | None) -> Best | None:
    complete = _scored(trials, attrs)
    if not complete:
        return None
    trial = min(complete, key=lambda t: (t.values[0], t.number))
    key = trial.user_attrs[records.CANDIDATE]
    return Best(
        trial=trial.number,
        candidate=Candidate.from_key(key),
        value=trial.values[0],
        cost=_cost(trial, attrs),
        trace_ratio=records.score(trial).get("trace_ratio"),
        fresh=_fresh(attrs, key, size),
    )


def _fresh(attrs: Mapping[str, Any], key: str, size: tuple[int, int] | None) -> records.Fresh | None:
    """A candidate's fresh values of a size, or else those on the most images."""
    size = size or records.largest_fresh(attrs, key)
    return records.fresh(attrs, key, *size) if size else None


def _scored(trials: Sequence[FrozenTrial], attrs: Mapping[str, Any]) -> list[FrozenTrial]:
    """``records.scored`` whose costs are known."""
    return [t for t in records.scored(trials) if _cost(t, attrs) is not None]


def _cost(trial: FrozenTrial, attrs: Mapping[str, Any]) -> Any:
    known = attrs.get(records.KNOWN_COSTS, {}).get(trial.user_attrs.get(records.KNOWN_NAME))
    return trial.user_attrs.get(records.COST, known)


@dataclass(frozen=True)
class StudyLine:
    """One line of ``adopt studies``: a shipped preset, a study in the database, or both.

    ``finished`` and ``best`` are None where there is nothing yet, or nothing that this version can read.
    """

    name: str
    description: str
    preset: bool
    finished: int | None
    budget: int
    best: float | None
    measure: str = ""
    """What ``best`` is: metric and images."""


def list_studies(storage: StudyStorage | None) -> list[StudyLine]:
    """Shipped presets, and the studies of a database if there is one."""
    lines = {}
    for name, path in presets().items():
        config = load_config(path)
        lines[name] = StudyLine(name, config.description, True, None, config.search.trials, None)
    if storage is None:
        return list(lines.values())
    for name in study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        if records.CONFIG in study.user_attrs:
            lines[name] = _line(study, preset=name in lines)
    return list(lines.values())


def _line(study: optuna.Study, preset: bool) -> StudyLine:
    try:
        config = stored_config(study)
    except StudyError:  # the other studies of the database can still be told
        version = study.user_attrs.get(records.VERSION)
        what = f"written by adopt {version}, this is {__version__}"
        return StudyLine(current_name(study), what, preset, None, 0, None)
    best = min(records.values_by_key(study).values(), default=None)
    finished = records.finished(study)
    measure = f"{study.user_attrs.get(records.METRIC, 'value')}, {config.score.images:,} images"
    return StudyLine(config.name, config.description, preset, finished, config.search.trials, best, measure)


RECENT = 20
"""Finished trials from which the rate is told."""
PAUSE = 10
"""Times the usual wait for a candidate, from which on nobody was working."""


@dataclass(frozen=True)
class Status:
    """Where a study stands now. ``rate``: finished candidates a second of late; None where that cannot be told yet."""

    finished: int
    budget: int
    states: dict[str, int]
    generation: int
    stage: int
    metric: str
    best: float | None
    images: int
    bank: int
    workers: list[Worker]
    rate: float | None
    warnings: list[str]

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the budget is met at the present rate."""
        return None if not self.rate else max(self.budget - self.finished, 0) / self.rate

    def to_json(self) -> dict[str, Any]:
        """The object that ``adopt status --json`` prints; scripts may rely on its keys."""
        return {**asdict(self), "seconds_left": self.seconds_left}


def read_status(storage: StudyStorage, study: optuna.Study, tail: str = "") -> Status:
    """Workers, trials by state, generation, stage and rate of a study; ``tail`` as in ``StudyReport.warnings``."""
    report = read_report(study)
    states = {state.name.lower(): sum(t.state == state for t in report.trials) for state in TrialState}
    return Status(
        finished=len(report.finished),
        budget=report.config.search.trials,
        states=states,
        **report.last_origin,
        metric=report.metric,
        best=None if report.best is None else report.best.value,
        images=report.config.score.images,
        bank=SEARCH_BANK,
        warnings=report.warnings(tail),
        workers=workers(study, storage, report.config.search.grace),
        rate=_rate(report.finished),
    )


def _rate(finished: Sequence[FrozenTrial]) -> float | None:
    """Candidates a second while the study is worked on, from the latest ones; None while that is unknown.

    A wait ten times as long as is usual was a pause. One that still lasts counts once it is longer than is usual.
    """
    ends = sorted(t.datetime_complete for t in finished if t.datetime_complete is not None)[-RECENT:]
    waits = [(after - before).total_seconds() for before, after in pairwise(ends)]
    if not waits:
        return None
    usual = statistics.median(waits)
    worked = [wait for wait in waits if wait <= PAUSE * usual]
    lasting = (datetime.now() - ends[-1]).total_seconds()
    spent = sum(worked) + (lasting if usual < lasting <= PAUSE * usual else 0.0)
    return len(worked) / spent if spent > 0 else None
