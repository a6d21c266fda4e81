"""RacePruner: stops a trial that has next to no chance of being among the best few, and no other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.special import stdtr

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.rungs import RungRegression
from autodiffusion_optuna.storage.attrs import SCREEN

DOUBT = 0.02
"""Chance of being among the best few that a trial may have at most where it is stopped, as far as the rung tells: at
each look, of which a study has as many as it has trials and rungs."""
PAIRED_DOUBT = 0.05
"""Chance that so large a difference of the images' mean distances is the images' own."""
MOST_BEST, COMPLETE_FOR_EACH = 4, 8
"""The best few are one trial, and one more for so many complete ones, up to four."""


class RacePruner(BasePruner):
    """Stops a trial whose reported value leaves it next to no chance of being among the best few.

    What a value at a step says of the last one is learned from the study's complete trials, by a regression with its
    error (``rungs.RungRegression``). A step that ranks the trials unlike the last one stops nobody, so that they go on
    to more images by themselves. Where trials carry the values by image behind a report (the trial's system attr
    ``SCREEN``), a trial must also be worse than each of the best few image by image: they share their noise, and a
    paired t-test sees through what the images have in common.

    The first trials are never stopped: there is nothing to compare with. ``doubt``: see ``DOUBT``. ``generation``:
    number of trials in a generation; they are then compared with those of earlier generations alone, and the decisions
    do not depend on how many workers there are. Raises ConfigError for a doubt out of (0, 0.5).
    """

    def __init__(self, doubt: float = DOUBT, generation: int | None = None) -> None:
        if not 0 < doubt < 0.5:
            raise ConfigError(f"doubt {doubt} must be in (0, 0.5)")
        self.doubt, self.generation = doubt, generation

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to stop the trial after its last report."""
        step = trial.last_step
        if step is None:
            return False
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        complete = sorted(
            (t for t in self._others(study, trial) if step in t.intermediate_values and math.isfinite(t.values[0])),
            key=lambda t: (sign * t.values[0], t.number),
        )
        pairs = [(sign * t.intermediate_values[step], sign * t.values[0]) for t in complete]
        rung = RungRegression.of(pairs)
        if rung is None or not rung.ranks:
            return False
        best = complete[: min(MOST_BEST, 1 + len(complete) // COMPLETE_FOR_EACH)]
        chance = rung.chance_below(sign * trial.intermediate_values[step], sign * best[-1].values[0])
        return chance < self.doubt and all(is_worse(trial, other, step, sign) for other in best)

    def _others(self, study: optuna.Study, trial: FrozenTrial) -> list[FrozenTrial]:
        """Complete trials to compare with."""
        trials = study.get_trials(deepcopy=False)
        complete = [t for t in trials if t.state == TrialState.COMPLETE and t.number != trial.number]
        if self.generation is None:
            return complete
        failed = [t.number for t in trials if t.state == TrialState.FAIL]
        first = index_of(trial.number, failed) // self.generation * self.generation
        return [t for t in complete if index_of(t.number, failed) < first]


def index_of(number: int, failed: Sequence[int]) -> int:
    """A trial's number without the failed trials before it."""
    return number - sum(other < number for other in failed)


def is_worse(trial: FrozenTrial, other: FrozenTrial, step: int, sign: float = 1.0) -> bool:
    """Whether the trial is worse than the other image by image, by a paired t-test; True where there are no images.

    ``step``: where both were reported; ``sign``: -1 where larger values are better.
    """
    one, two = (t.system_attrs.get(SCREEN) for t in (trial, other))
    if not (isinstance(one, list) and isinstance(two, list) and len(one) == len(two) == step and step > 1):
        return True
    differences = sign * (np.array(one, dtype=np.float64) - np.array(two, dtype=np.float64))
    error = float(differences.std(ddof=1)) / math.sqrt(step)
    if not error > 0:
        return bool(differences[0] > 0) or not math.isfinite(error)
    return float(stdtr(step - 1, -differences.mean() / error)) < PAIRED_DOUBT
