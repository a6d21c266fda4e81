"""What a study found, read without its model. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import SEARCH_BANK, StudyConfig
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.held_out import HeldOut, largest_held_out, stored_held_out
from autodiffusion_optuna.storage.attrs import (
    BASELINE_COSTS,
    BASELINE_KEYS,
    CANDIDATE,
    CODEC,
    COST,
    GENERATION,
    METRIC,
    NOISE,
    REFERENCE_IMAGES,
    RUNTIME,
    SANITY,
    STAGE,
    WARNINGS,
)
from autodiffusion_optuna.storage.studies import stored_config
from autodiffusion_optuna.storage.trials import FINISHED, generation_of, scored_trials, stored_score

PHASES = ("network", "features", "distance", "storage")
LOST_VARIETY = -0.2
"""log of the variance of features over the reference's below which the best candidate is worth a look."""
FIRST = {GENERATION: 0, STAGE: 1}


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table of candidates: the best found or a baseline, whose value is None until it was a trial."""

    name: str
    candidate: Candidate
    cost: float
    value: float | None
    held_out: HeldOut | None

    @property
    def timesteps(self) -> str:
        """Timesteps as text."""
        return " ".join(map(str, self.candidate.timesteps))

    @property
    def settings(self) -> str:
        """Settings that were searched, as text."""
        return ", ".join(f"{name} {value}" for name, value in self.candidate.settings)


@dataclass(frozen=True, eq=False)
class Best(Row):
    """The best complete trial.

    ``trace_ratio``: log of the variance of its features over the reference's; well below 0 it has lost variety.
    """

    value: float
    trial: int
    trace_ratio: float | None


@dataclass(frozen=True, eq=False)
class StudySummary:
    """All that ``adopt show`` prints of one study. ``attrs``: the study's user attributes, see ``storage.attrs``."""

    config: StudyConfig
    metric: str
    units: tuple[str, ...]
    trials: list[FrozenTrial]
    best: Best | None
    baselines: list[Row]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def noise(self) -> NoiseSchedule:
        """The model's noise schedule."""
        return NoiseSchedule.unpack(self.attrs[NOISE])

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
    def solver_names(self) -> str:
        """The solver of all candidates, or those that were searched."""
        solver = self.config.sampling.solver
        return ", ".join(solver) if isinstance(solver, list) else solver

    def rows(self) -> list[Row]:
        """The best found, then the baselines from best to worst; nothing where no candidate is finished."""
        if self.best is None:
            return []
        return [self.best, *sorted(self.baselines, key=lambda row: math.inf if row.value is None else row.value)]

    @property
    def uniform(self) -> Row | None:
        """The baseline of uniform steps."""
        return next((row for row in self.baselines if row.name == "uniform"), None)

    @property
    def held_out_size(self) -> tuple[int, int] | None:
        """(images, banks) of the held-out values on the most images; another candidate's may be of fewer."""
        return max((row.held_out.size for row in self.rows() if row.held_out is not None), default=None)

    def compared(self) -> tuple[Row, Row] | None:
        """The best found and uniform; None where one is missing.

        Their held-out values are of the same images, and None where there are no such values.
        """
        if self.best is None or self.uniform is None:
            return None
        pair: list[Row] = [self.best, self.uniform]
        if len({row.held_out and row.held_out.size for row in pair}) > 1:
            size = largest_held_out(self.attrs, *(row.candidate.key for row in pair))
            pair = [
                replace(row, held_out=size and stored_held_out(self.attrs, row.candidate.key, *size)) for row in pair
            ]
        return pair[0], pair[1]

    def warnings(self, tail: str = "") -> list[str]:
        """Everything to know before a value of the study is quoted, a line each: what ``adopt run`` said, and more.

        ``tail``: what commands in them end with, such as `` --storage URL``.
        """
        stored = [*(self.attrs.get(SANITY) or []), *(self.attrs.get(WARNINGS) or [])]
        return list(dict.fromkeys([*stored, *runtime_warnings(self.attrs), *self.found_doubtful(tail)]))

    def found_doubtful(self, tail: str = "") -> list[str]:
        """Those of ``warnings`` that only the trials and the held-out values show."""
        if self.best is None:
            return []
        held_out, trace_ratio = self.best.held_out, self.best.trace_ratio
        most, own = self.held_out_size, held_out and held_out.size
        lines = [held_out.warning] if held_out and held_out.warning else []
        if trace_ratio is not None and trace_ratio <= LOST_VARIETY:  # images may be too much alike
            share = f"{math.exp(trace_ratio):.0%} of the reference's variance"
            lines.append(f"the features of the best candidate's images have {share}; look at samples")
        if most is not None and own != most:
            lines.append(
                f"other candidates were scored on {banks_of(most)} held-out images, the best found on "
                f"{f'only {banks_of(own)}' if own else 'none'}; "
                f"score it too: adopt score --study {self.config.name} --images {most[0]} --banks {most[1]}{tail}"
            )
        return lines

    @property
    def finished(self) -> list[FrozenTrial]:
        """Complete and pruned trials by number."""
        return [t for t in self.trials if t.state in FINISHED]

    @property
    def last_origin(self) -> dict[str, Any]:
        """Generation and stage of the latest trial that has both."""
        having = (t.user_attrs for t in reversed(self.trials) if FIRST.keys() <= t.user_attrs.keys())
        attrs = next(having, FIRST)
        return {key: attrs[key] for key in FIRST}

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
        best = math.inf
        for trial in self.finished:
            if trial.state == TrialState.COMPLETE and trial.values:
                best = min(best, trial.values[0])
            stage = trial.user_attrs.get(STAGE, FIRST[STAGE])
            history[generation_of(trial)] = (stage, best if math.isfinite(best) else None)
        return [(generation, stage, value) for generation, (stage, value) in sorted(history.items())]

    def to_json(self, tail: str = "") -> dict[str, Any]:
        """The object that ``adopt show --json`` prints; scripts may rely on its keys.

        ``tail`` as in ``warnings``.
        """
        return {
            "study": self.config.name,
            "finished": len(self.finished),
            "budget": self.config.search.trials,
            **self.last_origin,
            "solver": self.config.sampling.solver,
            "metric": self.metric,
            "extractor": self.config.score.extractor,
            "images": self.config.score.images,
            "bank": SEARCH_BANK,
            "seed": self.config.score.seed,
            "reference_images": self.attrs.get(REFERENCE_IMAGES),
            "warnings": self.warnings(tail),
            "best": None if self.best is None else self._best_json(self.best),
            "baselines": [{"name": row.name, **self._row_json(row)} for row in self.baselines],
            "evaluations": {"run": int(self.total("run")), "saved": int(self.total("saved"))},
            "seconds": {
                **{phase: round(self.total(f"seconds_{phase}"), 3) for phase in PHASES},
                "total": round(self.wall_seconds, 3),
            },
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        return {
            "timesteps": list(row.candidate.timesteps),
            "settings": row.candidate.settings_dict,
            "value": row.value,
            "images": self.config.score.images,
            "bank": SEARCH_BANK,
            "held_out": None if row.held_out is None else row.held_out.summary(),
        }

    def _best_json(self, best: Best) -> dict[str, Any]:
        return {
            "trial": best.trial,
            **self._row_json(best),
            "skips": best.candidate.skip_names(self.units),
            "variance_ratio": None if best.trace_ratio is None else round(math.exp(best.trace_ratio), 6),
            "cost": best.cost,
        }


def read_summary(study: optuna.Study, size: tuple[int, int] | None = None) -> StudySummary:
    """Everything about a study that can be read without its model.

    ``size``: (images, banks) of the held-out values to show; None: each candidate's on the most images.
    """
    attrs = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    scored = scored_trials(trials)
    first = min(scored, key=lambda t: (t.values[0], t.number), default=None)
    values = {t.user_attrs[CANDIDATE]: t.values[0] for t in scored}
    costs = attrs.get(BASELINE_COSTS, {})

    def held_out(key: str) -> HeldOut | None:
        shown = size or largest_held_out(attrs, key)
        return stored_held_out(attrs, key, *shown) if shown else None

    return StudySummary(
        config=stored_config(study),
        metric=attrs.get(METRIC, "value"),
        units=tuple(attrs.get(CODEC, {}).get("units", ())),
        trials=trials,
        best=None
        if first is None
        else Best(
            name="best found",
            candidate=Candidate.from_key(first.user_attrs[CANDIDATE]),
            cost=first.user_attrs[COST],
            value=first.values[0],
            held_out=held_out(first.user_attrs[CANDIDATE]),
            trial=first.number,
            trace_ratio=stored_score(first).get("trace_ratio"),
        ),
        baselines=[
            Row(name, Candidate.from_key(key), costs[name], values.get(key), held_out(key))
            for name, key in attrs.get(BASELINE_KEYS, {}).items()
            if name in costs
        ],
        attrs=attrs,
    )


def banks_of(size: tuple[int, int]) -> str:
    """(images, banks) as it is shown everywhere: banks x images."""
    return f"{size[1]} x {size[0]:,}"


def runtime_warnings(attrs: Mapping[str, Any]) -> list[str]:
    """A line for each other runtime that some of the study's values were computed with."""
    lines, first = [], attrs.get(RUNTIME) or {}
    for other in (attrs[key] for key in sorted(attrs) if first and key.startswith(f"{RUNTIME}:")):
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        changed = ", ".join(f"{key} {first.get(key, 'none')} -> {other.get(key, 'none')}" for key in keys)
        if changed:
            lines.append(
                f"some values were computed otherwise than the first ones ({changed}): they may differ in their last "
                "digits"
            )
    return lines
