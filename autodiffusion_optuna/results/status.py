"""How far a study is, and which studies there are. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.config import BUNDLED, FILES, SEARCH_BANK, VALIDATION_BANK, flatten, load_config, presets
from autodiffusion_optuna.errors import StudyError
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import CONFIG, VERSION
from autodiffusion_optuna.storage.lease import Worker, workers
from autodiffusion_optuna.storage.studies import current_name, stored_config, study_names
from autodiffusion_optuna.storage.study_storage import StudyStorage
from autodiffusion_optuna.storage.trials import count_finished

RECENT = 20
"""Finished trials from which the rate is computed."""
PAUSE = 10
"""Times the usual wait for a candidate, from which on nobody was working."""


@dataclass(frozen=True)
class PresetLine:
    """A preset that ships with adopt. ``needs``: settings that name files or weights which it does not bring."""

    name: str
    description: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class StudyLine:
    """A study in the database; ``state``: how far it is, and whether anyone works on it.

    ``best`` is None where there is nothing yet, or nothing that this version can read. ``measure``: what it is, metric
    and images.
    """

    name: str
    description: str
    state: str
    best: float | None = None
    measure: str = ""


def list_presets() -> list[PresetLine]:
    """Presets by name."""
    lines = []
    for name, path in presets().items():
        config = load_config(path)
        settings = flatten(config.model_dump(mode="json"))
        needs = tuple(key for key in FILES if settings[key] is not None and settings[key] not in BUNDLED)
        lines.append(PresetLine(name, config.description, needs))
    return lines


def list_studies(storage: StudyStorage) -> list[StudyLine]:
    """Studies that adopt made in a database, by name."""
    found = (optuna.load_study(study_name=name, storage=storage) for name in study_names(storage))
    return [_line(study, storage) for study in found if CONFIG in study.user_attrs]


def _line(study: optuna.Study, storage: StudyStorage) -> StudyLine:
    attrs = study.user_attrs
    try:
        config = stored_config(study)
    except StudyError:  # the other studies of the database are listed all the same
        version = f"written by adopt {attrs.get(VERSION)}, this is {__version__}"
        return StudyLine(current_name(study), version, state="not readable")
    finished, budget = count_finished(study), config.search.trials
    running = sum(worker.alive for worker in workers(study, storage, config.search.grace))
    state = f"{finished} of {budget}"
    if running:
        state += f", {running} {'worker' if running == 1 else 'workers'}"
    elif finished < budget:
        state += ", stopped"
    summary = read_summary(study)
    return StudyLine(
        name=config.name,
        description=config.description,
        state=state if finished < budget or running else f"finished, {finished}",
        best=None if summary.best is None else summary.best.chosen_by,
        measure=f"{summary.metric}, {summary.best_images}",
    )


@dataclass(frozen=True)
class Status:
    """Where a study stands now. ``rate``: finished candidates a second of late; None where it is unknown yet.

    ``best``: the value by which it is the best, of so many ``images`` of that ``bank``. ``finalists``, ``validated``:
    candidates that are to be scored on the validation bank once the search ends, and those that are.
    """

    finished: int
    budget: int
    states: dict[str, int]
    generation: int
    stage: int
    metric: str
    best: float | None
    images: int
    bank: int
    finalists: int
    validated: int
    workers: list[Worker]
    rate: float | None
    warnings: list[str]

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the budget is met at the present rate."""
        return None if not self.rate else max(self.budget - self.finished, 0) / self.rate

    @property
    def best_images(self) -> str:
        """The images that ``best`` is of, as text."""
        noise = "validation" if self.bank == VALIDATION_BANK else "search"
        return f"{self.images:,} images, {noise} noise"

    def to_json(self) -> dict[str, Any]:
        """The object that ``adopt status --json`` prints; scripts may rely on its keys."""
        return {**asdict(self), "seconds_left": self.seconds_left}


def read_status(storage: StudyStorage, study: optuna.Study, tail: str = "") -> Status:
    """Workers, trials by state, generation, stage and rate of a study; ``tail`` as in ``StudySummary.warnings``."""
    summary = read_summary(study)
    chosen = summary.finalists
    states = {state.name.lower(): sum(t.state == state for t in summary.trials) for state in TrialState}
    return Status(
        finished=len(summary.finished),
        budget=summary.config.search.trials,
        states=states,
        **summary.last_origin,
        metric=summary.metric,
        best=None if summary.best is None else summary.best.chosen_by,
        images=summary.config.validation_images if chosen.complete else summary.config.score.images,
        bank=VALIDATION_BANK if chosen.complete else SEARCH_BANK,
        finalists=len(chosen.all),
        validated=chosen.validated,
        warnings=summary.warnings(tail),
        workers=workers(study, storage, summary.config.search.grace),
        rate=_rate(summary.finished),
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
