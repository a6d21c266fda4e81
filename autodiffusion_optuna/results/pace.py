"""How long scoring takes, from what the trials took. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.results.floors import many_steps
from autodiffusion_optuna.results.held_out import stored_held_out
from autodiffusion_optuna.storage.attrs import CANDIDATE, CODEC
from autodiffusion_optuna.storage.trials import scored_trials, stored_score

if TYPE_CHECKING:
    from autodiffusion_optuna.results.summary import StudySummary

RECENT = 64
"""Trials that are looked at: a live view asks after each."""
FLOOR_SECONDS = 60.0
"""A floor that takes no longer is scored however short the search was."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one image: ``step`` of each of its steps, with no evaluation spared, and ``features`` of the rest."""

    step: float
    features: float

    def seconds(self, steps: int, images: int) -> float:
        """Seconds that scoring ``images`` images of ``steps`` steps takes."""
        return images * (steps * self.step + self.features)


def pace_of(trials: Sequence[FrozenTrial]) -> Pace | None:
    """What the latest complete trials took; None where they do not say."""
    steps = images = run = asked = 0
    network = features = 0.0
    for trial in scored_trials(trials[-RECENT:]):
        score = stored_score(trial)
        if not score.get("rungs"):
            continue
        count = int(score["rungs"][-1][0])
        images += count
        steps += count * Candidate.from_key(trial.user_attrs[CANDIDATE]).steps
        run, asked = run + score["run"], asked + score["run"] + score["saved"]
        network, features = network + score["seconds_network"], features + score["seconds_features"]
    if not run or not steps:
        return None
    return Pace(network / run * asked / steps, features / images)


def affords(summary: StudySummary, steps: int, images: int) -> bool:
    """Whether scoring so many images of so many steps takes no longer than the search did, or a minute."""
    pace = pace_of(summary.trials)
    return pace is not None and pace.seconds(steps, images) <= max(FLOOR_SECONDS, summary.wall_seconds)


def validation_seconds(summary: StudySummary) -> float | None:
    """Seconds that the finalists' scores after the search take, at most; None where nothing was measured yet."""
    pace, config = pace_of(summary.trials), summary.config
    steps = config.sampling.step_bounds[1]
    return None if pace is None else config.finalists * pace.seconds(steps, config.validation_images)


def held_out_seconds(summary: StudySummary) -> float | None:
    """Seconds that the held-out scores after the search take, at most; None where nothing was measured yet.

    Those of the winner, of its uniform baseline and of the best other one, and the floor's where it is scored.
    """
    pace, score = pace_of(summary.trials), summary.config.score
    if pace is None or summary.best is None:
        return None
    images = score.held_out_images * score.held_out_banks
    seconds = 3 * pace.seconds(summary.config.sampling.step_bounds[1], images)
    if score.floor_steps > summary.best.candidate.steps and affords(summary, score.floor_steps, images):
        seconds += pace.seconds(score.floor_steps, images)
    return seconds


def floor_is_due(summary: StudySummary, steps: int, size: tuple[int, int]) -> bool:
    """Whether a run at its end still scores the floor of so many steps on ``size`` (images, banks)."""
    assert summary.best is not None
    floor = many_steps(summary.attrs[CODEC]["T"], steps, summary.best.candidate)
    if floor is None or stored_held_out(summary.attrs, floor.key, *size) is not None:
        return False
    return affords(summary, floor.steps, math.prod(size))
