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
from autodiffusion_optuna.config import SEARCH_BANK, load_config, presets
from autodiffusion_optuna.errors import StudyError
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import CONFIG, METRIC, VERSION
from autodiffusion_optuna.storage.lease import Worker, workers
from autodiffusion_optuna.storage.studies import current_name, stored_config, study_names
from autodiffusion_optuna.storage.study_storage import StudyStorage
from autodiffusion_optuna.storage.trials import count_finished, values_by_key

RECENT = 20
"""Finished trials from which the rate is computed."""
PAUSE = 10
"""Times the usual wait for a candidate, from which on nobody was working."""


@dataclass(frozen=True)
class StudyLine:
    """One line of ``adopt studies``: a shipped preset, a study in the database, or both.

    ``finished`` and ``best`` are None where there is nothing yet, or nothing that this version can read. ``measure``:
    what ``best`` is, metric and images.
    """

    name: str
    description: str
    preset: bool
    budget: int
    finished: int | None = None
    best: float | None = None
    measure: str = ""


def list_studies(storage: StudyStorage | None) -> list[StudyLine]:
    """Shipped presets, and the studies of a database if there is one."""
    configs = {name: load_config(path) for name, path in presets().items()}
    lines = {name: StudyLine(name, c.description, True, c.search.trials) for name, c in configs.items()}
    if storage is None:
        return list(lines.values())
    for name in study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        if CONFIG in study.user_attrs:
            lines[name] = _line(study, preset=name in configs)
    return list(lines.values())


def _line(study: optuna.Study, preset: bool) -> StudyLine:
    attrs = study.user_attrs
    try:
        config = stored_config(study)
    except StudyError:  # the other studies of the database are listed all the same
        version = f"written by adopt {attrs.get(VERSION)}, this is {__version__}"
        return StudyLine(current_name(study), version, preset, budget=0)
    return StudyLine(
        name=config.name,
        description=config.description,
        preset=preset,
        budget=config.search.trials,
        finished=count_finished(study),
        best=min(values_by_key(study).values(), default=None),
        measure=f"{attrs.get(METRIC, 'value')}, {config.score.images:,} images",
    )


@dataclass(frozen=True)
class Status:
    """Where a study stands now. ``rate``: finished candidates a second of late; None where it is unknown yet."""

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
    summary = read_summary(study)
    states = {state.name.lower(): sum(t.state == state for t in summary.trials) for state in TrialState}
    return Status(
        finished=len(summary.finished),
        budget=summary.config.search.trials,
        states=states,
        **summary.last_origin,
        metric=summary.metric,
        best=None if summary.best is None else summary.best.value,
        images=summary.config.score.images,
        bank=SEARCH_BANK,
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
