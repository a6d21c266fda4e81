"""Scoring on held-out noise, with what it takes and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autodiffusion_optuna.cli.output import clock, err, say
from autodiffusion_optuna.errors import program

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.candidate import Candidate
    from autodiffusion_optuna.study.components import StudyComponents

Report = Callable[[str], None]
"""Prints a line: of a run with its other progress, of a table's command beside it."""
SLOW_SECONDS = 10.0
"""Time from which a score says how long it takes."""


def validate(components: StudyComponents, study: optuna.Study) -> None:
    """Choose the winner among the finalists, then score it, its baselines and the floors, as a run does at its end."""
    from autodiffusion_optuna.study import validation

    score_finalists(components, study)
    validation.measure_real(components, study)
    named = validation.to_validate(components, study)
    if _due(components, study, named):
        say(f"scoring {', '.join(named)} {_cost(components, study, named)} …")
        score_all(components, study, named, say)
    score_floor(components, study, always=False, report=say)


def score_finalists(components: StudyComponents, study: optuna.Study) -> None:
    """Score the finalists on validation noise, and say what that takes."""
    from autodiffusion_optuna.results.finalists import read_finalists
    from autodiffusion_optuna.results.pace import pace_of
    from autodiffusion_optuna.study import validation

    images, due = components.config.validation_images, read_finalists(study, components.config).due
    if not due:
        return
    pace = pace_of(study.get_trials(deepcopy=False))
    seconds = None if pace is None else sum(pace.seconds(finalist.candidate.steps, images) for finalist in due)
    about = "" if seconds is None else f", about {clock(seconds)}"
    say(f"scoring {len(due)} {'finalist' if len(due) == 1 else 'finalists'} on {images:,} validation images{about} …")
    validation.score_finalists(components, study)


def score_study(
    components: StudyComponents, study: optuna.Study, others: Mapping[str, Candidate] | None = None, *, ablation: bool
) -> None:
    """Score the winner, all baselines, the best of each searched choice, ``others`` by name, and the floors."""
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.study import validation

    validation.measure_real(components, study)
    named = {**validation.to_validate(components, study), **components.baselines, **(others or {})}
    for setting, rows in read_summary(study).best_by_setting().items():
        named |= {f"best with {setting} {row.name}": row.candidate for row in rows}
    err.print(f"scoring {len(set(named.values()))} candidates {_cost(components, study, named)} …")
    score_all(components, study, named, err.print)
    score_floor(components, study, always=True, report=err.print)
    if ablation:
        score_ablation(components, study)


def score_all(
    components: StudyComponents,
    study: optuna.Study,
    named: dict[str, Candidate],
    report: Report,
    *,
    cached: bool = False,
) -> None:
    """Score candidates on the config's held-out banks, and say what is left where that is long; ``score_held_out``."""
    from autodiffusion_optuna.study import validation

    images, banks = components.config.score.held_out_images, components.config.score.held_out_banks
    started = time.monotonic()
    for done, (name, candidate) in enumerate(named.items(), 1):
        validation.score_held_out(components, study, candidate, images, banks, cached=cached)
        left = (time.monotonic() - started) / done * (len(named) - done)
        if left >= SLOW_SECONDS:
            report(f"scored {name}, time left {clock(left)}; Ctrl-C keeps what is done")


def score_floor(components: StudyComponents, study: optuna.Study, *, always: bool, report: Report) -> None:
    """Score the floor of many steps, or say what that would take and how to have it."""
    from autodiffusion_optuna.results.pace import affords
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.study import validation

    candidate = validation.floor_candidate(components, study)
    if candidate is None:
        return
    score, name = components.config.score, f"{candidate.steps} uniform steps"
    cost = f"{name} {_cost(components, study, {name: candidate})}"
    if not always and not affords(read_summary(study), candidate.steps, score.held_out_images * score.held_out_banks):
        why = f"left out, it would take longer than the search: {cost}"
        report(f"{why}; {program()} score --study {study.study_name} scores it")
        return
    report(f"scoring {cost} …")
    validation.score_floor(components, study, candidate)


def score_ablation(components: StudyComponents, study: optuna.Study) -> None:
    """Score the winner with each of its changes undone; neighbours share their first steps."""
    from autodiffusion_optuna.study import validation

    undone = {change.name: change.candidate for change in validation.changes(components, study)}
    err.print(
        f"ablation: the best found without each of its {len(undone)} changes, {_cost(components, study, undone)} …"
    )
    score_all(components, study, undone, err.print, cached=True)


def _cost(components: StudyComponents, study: optuna.Study, named: dict[str, Candidate]) -> str:
    """On what candidates are scored, and how long that takes at most as far as the trials tell."""
    from autodiffusion_optuna.results.pace import pace_of

    images, banks = components.config.score.held_out_images, components.config.score.held_out_banks
    where = f"on {banks} held-out banks of {images:,} images"
    pace = pace_of(study.get_trials(deepcopy=False))
    if pace is None:
        return where
    due = _due(components, study, named)
    return f"{where}, about {clock(sum(pace.seconds(c.steps, images * banks) for c in due))}"


def _due(components: StudyComponents, study: optuna.Study, named: dict[str, Candidate]) -> set[Candidate]:
    """Those of the candidates that are still to be scored on the config's held-out banks."""
    from autodiffusion_optuna.results.held_out import stored_held_out

    images, banks, attrs = (
        components.config.score.held_out_images,
        components.config.score.held_out_banks,
        study.user_attrs,
    )
    return {c for c in named.values() if stored_held_out(attrs, c.key, images, banks) is None}
