"""Reads a study and says what it found. Needs Optuna, never torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import (
    SEARCH_BANK,
    StudyConfig,
)
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.held_out import HeldOut, largest_held_out, runtime_warnings, stored_held_out
from autodiffusion_optuna.storage.attrs import (
    BASELINE,
    BASELINE_COSTS,
    BASELINES,
    CANDIDATE,
    COST,
    GENERATION,
    METRIC,
    NOISE,
    REFERENCE_IMAGES,
    SANITY,
    STAGE,
    WARNINGS,
)
from autodiffusion_optuna.storage.studies import stored_config
from autodiffusion_optuna.storage.trials import FINISHED, generation_of, scored_trials, stored_score

PHASES = ("network", "features", "distance", "storage")


LOST_VARIETY = -0.2
"""log of the variance of features over the reference's below which the best schedule is worth a look."""


FIRST = {GENERATION: 0, STAGE: 1}


@dataclass(frozen=True, eq=False)
class Baseline:
    """A baseline beside the search's: its value if it was a trial, and its held-out score if it has one."""

    name: str
    candidate: Candidate
    cost: float
    value: float | None
    held_out: HeldOut | None


@dataclass(frozen=True, eq=False)
class Best:
    """The best complete trial."""

    trial: int
    candidate: Candidate
    value: float
    cost: float
    trace_ratio: float | None
    """log of the variance of its features over the reference's; well below 0 it has lost variety."""
    held_out: HeldOut | None


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table of schedules."""

    name: str
    candidate: Candidate
    cost: float
    value: float | None
    held_out: HeldOut | None


@dataclass(frozen=True, eq=False)
class StudySummary:
    """All that ``adopt show`` prints of one study. ``attrs``: the study's user attributes, see ``storage.attrs``."""

    config: StudyConfig
    metric: str
    units: tuple[str, ...]
    trials: list[FrozenTrial]
    best: Best | None
    baselines: list[Baseline]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def noise(self) -> NoiseSchedule | None:
        """The model's noise schedule; None in studies begun by a version that did not store it."""
        packed = self.attrs.get(NOISE)
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
        images = self.attrs.get(REFERENCE_IMAGES)
        count = "of an unknown number of images" if images is None else f"of {images:,} images"
        path = self.config.score.reference
        return f"{'bundled with the model' if path is None else Path(path).name}, {count}"

    @property
    def held_out_size(self) -> tuple[int, int] | None:
        """(images, banks) of the held-out values on the most images; another schedule's may be of fewer."""
        return max((row.held_out.size for row in self.rows() if row.held_out is not None), default=None)

    def compared(self) -> tuple[Row, Row] | None:
        """The best found and uniform, their held-out values on the same images; None where one is missing."""
        rows = self.rows()
        uniform = next((row for row in rows if row.name == "uniform"), None)
        if uniform is None:
            return None
        pair = rows[0], uniform
        if rows[0].held_out and uniform.held_out and rows[0].held_out.size == uniform.held_out.size:
            return pair
        size = largest_held_out(self.attrs, *(row.candidate.key for row in pair))
        best, uniform = (
            replace(row, held_out=size and stored_held_out(self.attrs, row.candidate.key, *size)) for row in pair
        )
        return best, uniform

    def warnings(self, tail: str = "") -> list[str]:
        """Everything to know before a value of the study is quoted, a line each: what ``adopt run`` said, and more.

        ``tail``: what commands in them end with, such as `` --storage URL``.
        """
        stored = [*(self.attrs.get(SANITY) or []), *(self.attrs.get(WARNINGS) or [])]
        return list(dict.fromkeys([*stored, *runtime_warnings(self.attrs), *self.found_doubtful(tail)]))

    def found_doubtful(self, tail: str = "") -> list[str]:
        """Those of ``warnings`` that only the trials and the held-out values show."""
        held_out = self.best.held_out.warning if self.best and self.best.held_out else None
        return [*([held_out] if held_out else []), *_variety_warning(self.best), *self._fewer_images(tail)]

    def _fewer_images(self, tail: str) -> list[str]:
        """A line where a schedule was scored on more images than the best one."""
        if self.best is None or self.held_out_size is None:
            return []
        own = self.best.held_out.size if self.best.held_out else None
        if own == self.held_out_size:
            return []
        images, banks = self.held_out_size
        has = f"only {banks_of(own)}" if own else "none"
        return [
            f"other schedules were scored on {banks_of(self.held_out_size)} held-out images, the best found on {has}; "
            f"score it too: adopt score --study {self.config.name} --images {images} --banks {banks}{tail}"
        ]

    def rows(self) -> list[Row]:
        """The best found, then the baselines from best to worst; nothing where no candidate is finished."""
        if self.best is None:
            return []
        best = Row("best found", self.best.candidate, self.best.cost, self.best.value, self.best.held_out)
        ranked = sorted(self.baselines, key=lambda k: float("inf") if k.value is None else k.value)
        return [best, *(Row(k.name, k.candidate, k.cost, k.value, k.held_out) for k in ranked)]

    @property
    def finished(self) -> list[FrozenTrial]:
        """Complete and pruned trials by number."""
        return [t for t in self.trials if t.state in FINISHED]

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
        return float(sum(stored_score(t).get(field, 0) for t in self.finished))

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
            history[generation_of(trial)] = (attrs[STAGE], best if math.isfinite(best) else None)
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
            "reference_images": self.attrs.get(REFERENCE_IMAGES),
            "warnings": self.warnings(tail),
            "best": None if self.best is None else self._best_json(self.best),
            "baselines": [
                {
                    "name": baseline.name,
                    "timesteps": list(baseline.candidate.timesteps),
                    "settings": baseline.candidate.settings_dict,
                    "value": baseline.value,
                    **self._measured_on,
                    "held_out": None if baseline.held_out is None else baseline.held_out.summary(),
                }
                for baseline in self.baselines
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
            "held_out": None if best.held_out is None else best.held_out.summary(),
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


def read_summary(study: optuna.Study, size: tuple[int, int] | None = None) -> StudySummary:
    """Everything about a study that can be read without its model.

    ``size``: (images, banks) of the held-out values to show; None: each schedule's on the most images.
    """
    attrs = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    values = {  # of the trials just read: a running study has others a moment later
        t.user_attrs[CANDIDATE]: t.values[0] for t in _scored(trials, attrs)
    }
    best = _best(trials, attrs, size)
    costs = attrs.get(BASELINE_COSTS, {})
    baselines = [
        Baseline(
            name,
            Candidate.from_key(key),
            costs[name],
            values.get(key),
            _held_out(attrs, key, size),
        )
        for name, key in attrs.get(BASELINES, {}).items()
        if name in costs
    ]
    return StudySummary(
        config=stored_config(study),
        metric=attrs.get(METRIC, "value"),
        units=tuple(attrs.get("codec", {}).get("units", ())),
        trials=trials,
        best=best,
        baselines=baselines,
        attrs=attrs,
    )


def _best(trials: Sequence[FrozenTrial], attrs: dict[str, Any], size: tuple[int, int] | None) -> Best | None:
    complete = _scored(trials, attrs)
    if not complete:
        return None
    trial = min(complete, key=lambda t: (t.values[0], t.number))
    key = trial.user_attrs[CANDIDATE]
    return Best(
        trial=trial.number,
        candidate=Candidate.from_key(key),
        value=trial.values[0],
        cost=_cost(trial, attrs),
        trace_ratio=stored_score(trial).get("trace_ratio"),
        held_out=_held_out(attrs, key, size),
    )


def _held_out(attrs: Mapping[str, Any], key: str, size: tuple[int, int] | None) -> HeldOut | None:
    """A candidate's held-out values of a size, or else those on the most images."""
    size = size or largest_held_out(attrs, key)
    return stored_held_out(attrs, key, *size) if size else None


def _scored(trials: Sequence[FrozenTrial], attrs: Mapping[str, Any]) -> list[FrozenTrial]:
    """``scored`` whose costs are known."""
    return [t for t in scored_trials(trials) if _cost(t, attrs) is not None]


def _cost(trial: FrozenTrial, attrs: Mapping[str, Any]) -> Any:
    known = attrs.get(BASELINE_COSTS, {}).get(trial.user_attrs.get(BASELINE))
    return trial.user_attrs.get(COST, known)
