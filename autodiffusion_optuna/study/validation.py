"""The winner and its baselines on noise that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import optuna
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import StudyError
from autodiffusion_optuna.results.held_out import HeldOut, stored_held_out
from autodiffusion_optuna.storage.attrs import CANDIDATE, held_out_key
from autodiffusion_optuna.storage.trials import scored_trials, values_by_key
from autodiffusion_optuna.study.components import StudyComponents, too_few_images
from autodiffusion_optuna.study.loop import note_runtime


def best_candidate(study: optuna.Study) -> Candidate:
    """Of the best complete trial, the earlier one of equals (StudyError where there is none)."""
    complete = scored_trials(study.get_trials(deepcopy=False))
    if not complete:
        raise StudyError(
            f"study {study.study_name!r} has no finished trial yet; run it first: adopt run --study {study.study_name}"
        )
    return Candidate.from_key(min(complete, key=lambda trial: (trial.value, trial.number)).user_attrs[CANDIDATE])


def score_held_out(
    components: StudyComponents, study: optuna.Study, candidate: Candidate, images: int, banks: int
) -> HeldOut:
    """Score a candidate on ``banks`` banks of noise that the search never saw, and store the values.

    A score that is already stored for the same number of images and banks is returned as it is.
    """
    stored = stored_held_out(study.user_attrs, candidate.key, images, banks)
    if stored is not None:
        return stored
    values = tuple(components.evaluator.score(candidate, [images], bank=bank).value for bank in range(1, banks + 1))
    note_runtime(components, study)
    scored = HeldOut(images, values, too_few_images(components, images))
    study.set_user_attr(held_out_key(candidate.key, images, banks), scored.to_json())
    return scored


def to_validate(components: StudyComponents, study: optuna.Study) -> dict[str, Candidate]:
    """What a finished study scores on held-out noise: uniform, the best other baseline, and the winner.

    The winner comes last: once it has its score, all have.
    """
    found = {"uniform": components.baselines["uniform"]}
    values = values_by_key(study)
    scored = {name: values[c.key] for name, c in components.baselines.items() if c.key in values and name != "uniform"}
    if scored:
        name = min(scored, key=lambda name: scored[name])
        found[name] = components.baselines[name]
    return {**found, "best": best_candidate(study)}


def validate(
    components: StudyComponents, study: optuna.Study, on_score: Callable[[str, int, int], None] | None = None
) -> None:
    """Score all of ``to_validate`` on the config's held-out banks; ``on_score`` is called with (name, done, all)."""
    images, banks = components.config.score.held_out_images, components.config.score.held_out_banks
    candidates = to_validate(components, study)
    for done, (name, candidate) in enumerate(candidates.items(), 1):
        score_held_out(components, study, candidate, images, banks)
        if on_score is not None:
            on_score(name, done, len(candidates))


def samples(
    components: StudyComponents, named: Iterable[tuple[str, Candidate]], images: int
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Labelled samples of named candidates from the same held-out noises, uint8 [images, C, H, W] each."""
    labelled = {f"{name}, {candidate.steps} steps": candidate for name, candidate in named}
    return [(label, components.evaluator.sample(c, 0, images, bank=1).cpu().numpy()) for label, c in labelled.items()]
