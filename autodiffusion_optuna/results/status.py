"""Reads a study and says what it found. Needs Optuna, never torch."""

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
from autodiffusion_optuna.config import (
    SEARCH_BANK,
    load_config,
    presets,
)
from autodiffusion_optuna.errors import StudyError
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import CONFIG, METRIC, VERSION
from autodiffusion_optuna.storage.lease import Worker, workers
from autodiffusion_optuna.storage.studies import current_name, stored_config, study_names
from autodiffusion_optuna.storage.study_storage import StudyStorage
from autodiffusion_optuna.storage.trials import count_finished, values_by_key


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
        if CONFIG in study.user_attrs:
            lines[name] = _line(study, preset=name in lines)
    return list(lines.values())


def _line(study: optuna.Study, preset: bool) -> StudyLine:
    try:
        config = stored_config(study)
    except StudyError:  # the other studies of the database can still be told
        version = study.user_attrs.get(VERSION)
        what = f"written by adopt {version}, this is {__version__}"
        return StudyLine(current_name(study), what, preset, None, 0, None)
    best = min(values_by_key(study).values(), default=None)
    finished = count_finished(study)
    measure = f"{study.user_attrs.get(METRIC, 'value')}, {config.score.images:,} images"
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
    """Workers, trials by state, generation, stage and rate of a study; ``tail`` as in ``StudySummary.warnings``."""
    report = read_summary(study)
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
