"""What a trial says of itself; those of other programs may say less."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.storage.attrs import CANDIDATE, COST, GENERATION, SCORE

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def count_finished(study: optuna.Study) -> int:
    """Trials that count towards the budget: complete or pruned."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def values_by_key(study: optuna.Study) -> dict[str, float]:
    """Values of complete trials by candidate key."""
    return {t.user_attrs[CANDIDATE]: t.values[0] for t in scored_trials(study.get_trials(deepcopy=False))}


def scored_trials(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Complete trials that say what they tried and at what cost; those of other programs may not."""
    complete = (t for t in trials if t.state == TrialState.COMPLETE and t.values)
    return [t for t in complete if _says_candidate(t) and isinstance(t.user_attrs.get(COST), (int, float))]


def _says_candidate(trial: FrozenTrial) -> bool:
    key = trial.user_attrs.get(CANDIDATE)
    return isinstance(key, str) and _is_candidate(key)


@functools.lru_cache(maxsize=2**16)
def _is_candidate(key: str) -> bool:
    try:
        Candidate.from_key(key)
    except ValueError:
        return False
    return True


def generation_of(trial: FrozenTrial) -> int:
    """Generation of a trial; 0 for one that does not say."""
    said = trial.user_attrs.get(GENERATION)
    return said if isinstance(said, int) else 0


def stored_score(trial: FrozenTrial) -> Mapping[str, Any]:
    """What the evaluator says of a trial's value; empty for one that was not scored here."""
    said = trial.system_attrs.get(SCORE)
    return said if isinstance(said, dict) else {}
