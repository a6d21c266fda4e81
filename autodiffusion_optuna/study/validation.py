"""The finalists on noise that chooses among them, then the winner and its baselines on noise that chose nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import torch

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import VALIDATION_BANK
from autodiffusion_optuna.errors import AdoptError, StatisticsError
from autodiffusion_optuna.evaluation.references.floor import real_distance
from autodiffusion_optuna.results.ablation import Undone, undo_each
from autodiffusion_optuna.results.finalists import best_candidate, read_finalists
from autodiffusion_optuna.results.floors import RealFloor, many_steps, stored_real_floor
from autodiffusion_optuna.results.headline import is_uniform
from autodiffusion_optuna.results.held_out import HeldOut, begun_held_out, stored_held_out
from autodiffusion_optuna.results.pace import affords
from autodiffusion_optuna.results.race import stopped_at
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import (
    BASELINE_COSTS,
    BASELINE_KEYS,
    CANDIDATE,
    MANY_STEPS,
    REAL_FLOOR,
    held_out_key,
    validation_key,
)
from autodiffusion_optuna.storage.trials import values_by_key
from autodiffusion_optuna.study.components import (
    ImageComponents,
    StudyComponents,
    relative_cost,
    too_few_images,
    uniform_with,
)
from autodiffusion_optuna.study.loop import note_runtime


def score_finalists(components: StudyComponents, study: optuna.Study) -> None:
    """Score the finalists that have no value yet on the validation bank, and store each as soon as it has one.

    What another worker has stored meanwhile stays: all of them then see one winner. One that cannot be scored is left
    out, with the reason; a later run tries it again.
    """
    for finalist in read_finalists(study, components.config).due:
        key = validation_key(finalist.candidate.key, components.config.validation_images)
        if "rungs" in study.user_attrs.get(key, {}):
            continue
        said = _validated(components, finalist.candidate)
        note_runtime(components, study)
        if "rungs" not in study.user_attrs.get(key, {}):
            study.set_user_attr(key, said)


def _validated(components: StudyComponents, candidate: Candidate) -> dict[str, Any]:
    """A candidate's score on the validation bank, at the search's number of images too, as it is stored."""
    rungs = sorted({components.config.score.images, components.config.validation_images})
    try:
        # Finalists are often neighbours: they share first steps with each other, though not with the search.
        score = components.evaluator.score(candidate, rungs, bank=VALIDATION_BANK, cached=True)
        if not math.isfinite(score.value):
            raise StatisticsError(f"the distance is {score.value}")
    except (AdoptError, torch.OutOfMemoryError, MemoryError) as error:
        return {"failure": " ".join(str(error).split())[:500] or "out of memory"}
    return score.to_json()


def score_held_out(
    components: StudyComponents,
    study: optuna.Study,
    candidate: Candidate,
    images: int,
    banks: int,
    *,
    cached: bool = False,
) -> HeldOut:
    """Score a candidate on ``banks`` banks of noise that the search never saw, and store the values.

    Banks of as many images that are stored already are not scored again. ``cached``: whether it shares first steps
    with the candidates that were scored before it.
    """
    stored = stored_held_out(study.user_attrs, candidate.key, images, banks)
    if stored is not None:
        return stored
    begun = begun_held_out(study.user_attrs, candidate.key, images, banks)
    rest = tuple(
        components.evaluator.score(candidate, [images], bank=bank, cached=cached).value
        for bank in range(len(begun) + 1, banks + 1)
    )
    note_runtime(components, study)
    scored = HeldOut(images, (*begun, *rest), too_few_images(components, images))
    study.set_user_attr(held_out_key(candidate.key, images, banks), scored.to_json())
    return scored


def own_uniform(components: StudyComponents, study: optuna.Study, best: Candidate) -> tuple[str, Candidate]:
    """Name and candidate of the uniform baseline with the settings of ``best``, which the headline compares it with.

    Where the search had no such baseline it is one of the study's from now on.
    """
    candidate = uniform_with(components.space, best.settings_dict)
    keys, costs = study.user_attrs.get(BASELINE_KEYS, {}), study.user_attrs.get(BASELINE_COSTS, {})
    name = next((name for name, key in keys.items() if key == candidate.key and is_uniform(name)), None)
    if name is None:
        name = settings_label("uniform", candidate)
        study.set_user_attr(BASELINE_COSTS, {**costs, name: relative_cost(components, candidate)})
        study.set_user_attr(BASELINE_KEYS, {**keys, name: candidate.key})
    return name, candidate


def to_validate(components: StudyComponents, study: optuna.Study) -> dict[str, Candidate]:
    """What a finished study scores on held-out noise: uniform as the winner is, the best other baseline, the winner.

    Where all others were stopped on the way, the best is the one that came farthest, and there has the lowest value.
    The winner comes last: once it has its score, all have.
    """
    best = best_candidate(study)
    name, uniform = own_uniform(components, study, best)
    reached = {key: (-math.inf, value) for key, value in values_by_key(study).items()}
    for trial in study.get_trials(deepcopy=False):
        images = stopped_at(trial)
        if images is not None and CANDIDATE in trial.user_attrs:
            reached.setdefault(trial.user_attrs[CANDIDATE], (-images, trial.intermediate_values[images]))
    others = {n: c for n, c in components.baselines.items() if c.key in reached and c.key != uniform.key}
    found = {name: uniform}
    if others:
        name = min(others, key=lambda name: reached[others[name].key])
        found[name] = others[name]
    return {**found, "best": best}


def most_to_validate(components: StudyComponents) -> int:
    """How many candidates ``to_validate`` gives at most."""
    return 2 + (len(components.baselines) > 1)


def validate(components: StudyComponents, study: optuna.Study) -> None:
    """Choose the winner, score ``to_validate`` on the config's held-out banks, then the floors, without a word."""
    score_finalists(components, study)
    images, banks = components.config.score.held_out_images, components.config.score.held_out_banks
    measure_real(components, study)
    for candidate in to_validate(components, study).values():
        score_held_out(components, study, candidate, images, banks)
    floor = floor_candidate(components, study)
    if floor is not None and affords(read_summary(study), floor.steps, images * banks):
        score_floor(components, study, floor)


def floor_candidate(components: StudyComponents, study: optuna.Study) -> Candidate | None:
    """The floor of many uniform steps with the winner's settings; None where the config wants none."""
    return many_steps(components.space.T, components.config.score.floor_steps, best_candidate(study))


def score_floor(components: StudyComponents, study: optuna.Study, candidate: Candidate) -> HeldOut:
    """Score the floor of many steps on the config's held-out banks, and store which it is."""
    images, banks = components.config.score.held_out_images, components.config.score.held_out_banks
    # Named before it is scored: a run that is killed in between finds it without a score, and scores it.
    cost = relative_cost(components, candidate)
    study.set_user_attr(MANY_STEPS, {"candidate": candidate.key, "cost": cost})
    return score_held_out(components, study, candidate, images, banks)


def measure_real(components: StudyComponents, study: optuna.Study) -> None:
    """Store the distance of as many real images from the reference as a held-out bank has, or why there is none."""
    stored = stored_real_floor(study.user_attrs)
    if stored is None or stored.images != components.config.score.held_out_images:
        study.set_user_attr(REAL_FLOOR, _real_floor(components).to_json())


def _real_floor(components: StudyComponents) -> RealFloor:
    score, evaluator, shipped = components.config.score, components.evaluator, components.model.floor
    images = score.held_out_images
    if score.metric != "frechet":
        return RealFloor(None, images, None, "a kernel distance of real images is 0 but for chance")
    its_own = score.reference is None and shipped is not None and shipped.extractor == evaluator.extractor.name
    if its_own and shipped is not None and images in shipped.values:
        return RealFloor(shipped.values[images], images, evaluator.reference.n, "real images that trained nothing")
    path = None if score.reference is None else Path(score.reference)
    found = real_distance(evaluator.reference, path, evaluator.extractor, images)
    if isinstance(found, str):
        return RealFloor(None, images, None, found)
    value, count, others = found
    return RealFloor(value, count, others, "images of the reference against all its others")


def changes(components: StudyComponents, study: optuna.Study) -> list[Undone]:
    """The winner with each of its changes undone; see ``undo_each``."""
    return undo_each(best_candidate(study), components.space.codec())


def compared(components: StudyComponents | ImageComponents, best: Candidate) -> list[tuple[str, Candidate]]:
    """The two candidates of the headline by name: the uniform baseline with the settings of ``best``, then ``best``."""
    uniform = uniform_with(components.space, best.settings_dict)
    return [(settings_label("uniform", uniform), uniform), (settings_label("best found", best), best)]


def settings_label(name: str, candidate: Candidate) -> str:
    """A candidate's name with all settings that were searched."""
    return ", ".join([name, *(f"{setting} {value}" for setting, value in candidate.settings)])
