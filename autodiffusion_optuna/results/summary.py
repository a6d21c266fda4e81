"""What a study found, read without its model. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import REUSE, SKIP, Candidate
from autodiffusion_optuna.config import SEARCH_BANK, StudyConfig
from autodiffusion_optuna.errors import program
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.ablation import Change, ablation_of
from autodiffusion_optuna.results.finalists import Finalists, choose
from autodiffusion_optuna.results.floors import RealFloor, stored_many_steps, stored_real_floor
from autodiffusion_optuna.results.headline import Headline, difference_json, headline_of, own_uniform
from autodiffusion_optuna.results.held_out import (
    Difference,
    HeldOut,
    largest_held_out,
    paired,
    significant,
    stored_held_out,
)
from autodiffusion_optuna.results.race import Race, race_of, stopped_at
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
    SCREEN_TEACHER,
    STAGE,
    START_COSTS,
    START_SECONDS,
    STARTS,
    VALIDATION,
    WARNINGS,
)
from autodiffusion_optuna.storage.studies import stored_config
from autodiffusion_optuna.storage.trials import FINISHED, generation_of, scored_trials, stored_score

PHASES = ("network", "features", "distance", "storage")
LOST_VARIETY = -0.2
"""log of the variance of features over the reference's below which the best candidate is worth a look."""
FIRST = {GENERATION: 0, STAGE: 1}
STAGES = {1: "timesteps", 2: "timesteps and layers"}
"""What each stage of the search searches, as it is shown."""


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table of candidates: the best found or a baseline, whose value is None until it was a trial.

    ``stopped``: images after which its trial was stopped; what it had there is no value of a whole score, and it has
    none.
    """

    name: str
    candidate: Candidate
    cost: float
    value: float | None
    held_out: HeldOut | None
    stopped: int | None = field(default=None, kw_only=True)

    @property
    def value_text(self) -> str:
        """Its value in the search, or that it was stopped before it had one, as text."""
        if self.value is not None:
            return significant(self.value)
        return "-" if self.stopped is None else f"stopped at {self.stopped:,}"

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
    """The complete trial that is the study's result, see ``finalists.choose``.

    ``value``: in the search. ``trace_ratio``: log of the variance of its features over the reference's; well below 0
    it has lost variety. ``validated``: its value on the validation bank, which chose it; None where the search's did.
    """

    value: float
    trial: int
    trace_ratio: float | None
    validated: float | None = None

    @property
    def chosen_by(self) -> float:
        """The value by which it is the best."""
        return self.value if self.validated is None else self.validated


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
    size: tuple[int, int] | None = None
    """(images, banks) of the held-out values to show; None: each candidate's on the most images."""
    finalists: Finalists = field(default_factory=Finalists)

    @property
    def noise(self) -> NoiseSchedule:
        """The model's noise schedule."""
        return NoiseSchedule.unpack(self.attrs[NOISE])

    @property
    def value_name(self) -> str:
        """What the value of every candidate is: the metric, and the images it was measured on."""
        return f"{self.metric}, {self.config.score.images:,} images"

    @property
    def best_images(self) -> str:
        """The images that ``best.chosen_by`` is of, as text."""
        return images_of(self.config, validated=self.finalists.complete)

    @property
    def lead(self) -> tuple[float, str] | None:
        """Best value in the search and its candidate's key, whichever is the result; None where none is finished."""
        first = min(scored_trials(self.trials), key=lambda t: (t.values[0], t.number), default=None)
        return None if first is None else (first.values[0], first.user_attrs[CANDIDATE])

    @property
    def choice_text(self) -> str | None:
        """One sentence: how the best was chosen, and how much the search flattered it; None without finalists."""
        return self.finalists.text(self.metric, self.config.score.images)

    @property
    def trial_value_name(self) -> str:
        """What a trial's value is, that of a pruned one too."""
        if self.config.pruner == "none":
            return self.value_name
        return self.value_name + (
            ", fewer or the screen's where pruned" if self.config.screen_images else ", fewer where pruned"
        )

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
        solver, order = self.config.sampling.solver, self.config.sampling.order
        names = ", ".join(solver) if isinstance(solver, list) else solver
        return f"{names} of order {order}" if isinstance(order, int) else names

    def rows(self) -> list[Row]:
        """The best found, its uniform baseline, then the others from best to worst; nothing where none is finished."""
        if self.best is None:
            return []
        own = own_uniform(self.best, self.baselines)
        return [
            self.best,
            *sorted(self.baselines, key=lambda row: (row is not own, math.inf if row.value is None else row.value)),
        ]

    @property
    def uniform(self) -> Row | None:
        """The baseline of uniform steps."""
        return next((row for row in self.baselines if row.name == "uniform"), None)

    @property
    def held_out_size(self) -> tuple[int, int] | None:
        """(images, banks) of the held-out values on the most images; another candidate's may be of fewer."""
        return max((row.held_out.size for row in self.rows() if row.held_out is not None), default=None)

    @property
    def headline(self) -> Headline | None:
        """The best found against the uniform baseline of the same solver and settings; None where one is missing."""
        return headline_of(self)

    def difference(self, row: Row) -> Difference | None:
        """A row's held-out values minus those of the headline's baseline, paired by bank.

        None for that baseline itself, and where their values are not of the same images.
        """
        own = self.best and own_uniform(self.best, self.baselines)
        if not own or not own.held_out or not row.held_out or row.candidate.key == own.candidate.key:
            return None
        return paired(row.held_out, own.held_out)

    @property
    def race(self) -> Race | None:
        """What the screen and the rungs decided; None where there are none."""
        return race_of(self.trials, self.config.score.images)

    @property
    def many_steps(self) -> Row | None:
        """The floor of many uniform steps with the best one's settings; None where it was not scored."""
        stored = self.best and stored_many_steps(self.attrs, self.best.candidate.settings)
        if not stored:
            return None
        candidate, cost = stored
        held_out = held_out_of(self.attrs, candidate.key, self.size)
        return None if held_out is None else Row(f"uniform, {candidate.steps} steps", candidate, cost, None, held_out)

    @property
    def real_floor(self) -> RealFloor | None:
        """The distance of real images from the reference; None where nobody has looked yet."""
        return stored_real_floor(self.attrs)

    @property
    def ablation(self) -> list[Change]:
        """Which single change of the best found earned how much, as far as ``adopt score --ablation`` scored it."""
        if self.best is None or CODEC not in self.attrs:
            return []
        return ablation_of(self.attrs, self.best.candidate, self.size, self.attrs[CODEC])

    def best_by_setting(self) -> dict[str, list[Row]]:
        """The best candidate of each value of every searched choice, such as each solver; a row is named by its value.

        From best to worst, the study's best first; values that no finished candidate has are missing.
        """
        found: dict[str, dict[str, Row]] = {name: {} for name in self.attrs.get(CODEC, {}).get("choices", {})}
        first = None if self.best is None else self.best.trial
        for trial in sorted(scored_trials(self.trials), key=lambda t: (t.number != first, t.values[0], t.number)):
            candidate = Candidate.from_key(trial.user_attrs[CANDIDATE])
            for name, rows in found.items():
                value = str(candidate.settings_dict.get(name))
                if value not in rows:
                    held_out = held_out_of(self.attrs, candidate.key, self.size)
                    rows[value] = Row(value, candidate, trial.user_attrs[COST], trial.values[0], held_out)
        return {name: list(rows.values()) for name, rows in found.items() if rows}

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
        lines = [*self.finalists.doubts(), *([held_out.warning] if held_out and held_out.warning else [])]
        if trace_ratio is not None and trace_ratio <= LOST_VARIETY:  # images may be too much alike
            share = f"{math.exp(trace_ratio):.0%} of the reference's variance"
            lines.append(f"the features of the best candidate's images have {share}; look at samples")
        if most is not None and own != most:
            lines.append(
                f"other candidates were scored on {banks_of(most)} held-out images, the best found on "
                f"{f'only {banks_of(own)}' if own else 'none'}; "
                f"score it too: {program()} score --study {self.config.name} --images {most[0]} --banks {most[1]}{tail}"
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
    def evaluations(self) -> dict[str, int]:
        """Network evaluations, counted by image: "run" in all, "saved" by reuse; of those run, "starts" for computed
        starts, "screen" for the screen's teacher and "validation" for finalists."""
        costs = self.attrs.get(START_COSTS, {})
        screen = costs.get(SCREEN_TEACHER, 0)
        validation = int(self.validation_total("run"))
        return {
            "run": int(self.total("run")) + sum(costs.values()) + validation,
            "saved": int(self.total("saved") + self.validation_total("saved")),
            STARTS: sum(self.start_evaluations.values()),
            SCREEN_TEACHER: screen,
            "validation": validation,
        }

    @property
    def start_evaluations(self) -> dict[str, int]:
        """Network evaluations, counted by image, of each start that was computed, and of the teacher they come from."""
        costs = self.attrs.get(START_COSTS, {})
        return {name: cost for name, cost in costs.items() if name != SCREEN_TEACHER}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the search and of validation by phase, and of what came before them."""
        scored = {p: self.total(f"seconds_{p}") + self.validation_total(f"seconds_{p}") for p in PHASES}
        return scored | self.start_seconds

    @property
    def start_seconds(self) -> dict[str, float]:
        """Seconds of computing starts and of the screen's teacher, keys as in ``evaluations``."""
        return {STARTS: 0.0, SCREEN_TEACHER: 0.0, **self.attrs.get(START_SECONDS, {})}

    @property
    def validation_seconds(self) -> float:
        """Seconds of all scores on the validation bank."""
        return sum(self.validation_total(f"seconds_{phase}") for phase in PHASES)

    def validation_total(self, field: str) -> float:
        """Sum of one field of all scores on the validation bank."""
        stored = (value for key, value in self.attrs.items() if key.startswith(f"{VALIDATION}:"))
        return float(sum(score.get(field, 0) for score in stored))

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
        headline = self.headline
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
            "headline": headline and headline.to_json(),
            "best": None if self.best is None else self._best_json(self.best),
            "validation": self.finalists.to_json(self.config.validation_images),
            "baselines": [
                {"name": row.name, **self._row_json(row), "stopped_at": row.stopped} for row in self.baselines
            ],
            "floors": {
                "many_steps": self.many_steps and self._row_json(self.many_steps),
                "real": self.real_floor and self.real_floor.to_json(),
            },
            "best_by_setting": {
                name: {row.name: self._row_json(row) for row in rows} for name, rows in self.best_by_setting().items()
            },
            "ablation": [change.to_json() for change in self.ablation],
            "race": self.race and self.race.to_json(),
            "evaluations": self.evaluations,
            "start_evaluations": self.start_evaluations,
            "seconds": {
                **{phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
                "total": round(self.wall_seconds + self.validation_seconds + sum(self.start_seconds.values()), 3),
            },
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        own = self.best and own_uniform(self.best, self.baselines)
        return {
            "timesteps": list(row.candidate.timesteps),
            "settings": row.candidate.settings_dict,
            "value": row.value,
            "images": self.config.score.images,
            "bank": SEARCH_BANK,
            "held_out": None if row.held_out is None else row.held_out.summary(),
            "difference": difference_json(self.difference(row), own.name) if own else None,
        }

    def _best_json(self, best: Best) -> dict[str, Any]:
        return {
            "trial": best.trial,
            **self._row_json(best),
            "validation": best.validated,
            "skips": best.candidate.unit_names(self.units, SKIP),
            "reuses": best.candidate.unit_names(self.units, REUSE),
            "variance_ratio": None if best.trace_ratio is None else round(math.exp(best.trace_ratio), 6),
            "cost": best.cost,
        }


def read_summary(study: optuna.Study, size: tuple[int, int] | None = None) -> StudySummary:
    """Everything about a study that can be read without its model.

    ``size``: (images, banks) of the held-out values to show; None: each candidate's on the most images.
    """
    attrs = study.user_attrs
    trials, config = study.get_trials(deepcopy=False), stored_config(study)
    finalists = choose(trials, attrs, config)
    first = finalists.winner
    values = {t.user_attrs[CANDIDATE]: t.values[0] for t in scored_trials(trials)}
    stopped = {t.user_attrs.get(CANDIDATE): stopped_at(t) for t in trials}
    costs = attrs.get(BASELINE_COSTS, {})

    return StudySummary(
        config=config,
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
            held_out=held_out_of(attrs, first.user_attrs[CANDIDATE], size),
            trial=first.number,
            trace_ratio=stored_score(first).get("trace_ratio"),
            validated=None if finalists.won is None else finalists.won.validated,
        ),
        baselines=[
            Row(
                name,
                Candidate.from_key(key),
                costs[name],
                values.get(key),
                held_out_of(attrs, key, size),
                stopped=None if key in values else stopped.get(key),
            )
            for name, key in attrs.get(BASELINE_KEYS, {}).items()
            if name in costs
        ],
        attrs=attrs,
        size=size,
        finalists=finalists,
    )


def held_out_of(attrs: Mapping[str, Any], key: str, size: tuple[int, int] | None) -> HeldOut | None:
    """Stored held-out values of a candidate of that ``size``, or those on the most images."""
    shown = size or largest_held_out(attrs, key)
    return stored_held_out(attrs, key, *shown) if shown else None


def banks_of(size: tuple[int, int]) -> str:
    """(images, banks) as it is shown everywhere: banks x images."""
    return f"{size[1]} x {size[0]:,}"


def images_of(config: StudyConfig, *, validated: bool) -> str:
    """The images of a value in the search, or of a finalist's on the validation bank, as text."""
    if validated:
        return f"{config.validation_images:,} images, validation noise"
    return f"{config.score.images:,} images, search noise"


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
