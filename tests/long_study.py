"""The summary of a study of any length, with the attributes that a real one stores."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from autodiffusion_optuna import noise
from autodiffusion_optuna.candidate import Candidate, packed
from autodiffusion_optuna.config import StudyConfig, load_preset
from autodiffusion_optuna.results.summary import Best, Row, StudySummary
from autodiffusion_optuna.storage.attrs import CANDIDATE, COST, GENERATION, NOISE, OPERATOR, SCORE, STAGE

T, STEPS, POPULATION = 1000, 10, 20
OPERATORS = ("random", "mutation", "crossover")


def long_summary(trials: int, units: int = 58, seed: int = 0) -> StudySummary:
    """Values fall with the trials' numbers, so that nearly every generation has a new best; one in ten is pruned."""
    rng = np.random.default_rng(seed)
    uniform = Candidate(tuple(range(900, -1, -100)))
    made = [_trial(rng, number, trials, units) for number in range(trials)]
    complete = [t for t in made if t.state == TrialState.COMPLETE]
    best = min(complete, key=lambda t: t.values[0], default=None)
    return StudySummary(
        config=_config(),
        metric="FD(digits)",
        units=tuple(f"{'down' if u < units // 2 else 'up'}_blocks.{u}.resnets.0" for u in range(units)),
        trials=made,
        best=None if best is None else _best(best),
        baselines=[Row(name, uniform, 1.0, value, None) for name, value in (("uniform", 60.0), ("cosine", 55.0))],
        attrs={NOISE: noise.linear(T).pack()},
    )


def _config() -> StudyConfig:
    return load_preset("digits-10-layers")


def _trial(rng: np.random.Generator, number: int, trials: int, units: int) -> FrozenTrial:
    timesteps = np.sort(rng.choice(T, STEPS, replace=False))[::-1].tolist()
    skips = [packed(np.flatnonzero(rng.random(units) < 0.2).tolist()) for _ in range(STEPS)]
    attrs: dict[str, Any] = {
        CANDIDATE: Candidate(tuple(timesteps), tuple(skips)).key,
        GENERATION: number // POPULATION,
        STAGE: 1 if number < trials // 3 else 2,
        OPERATOR: OPERATORS[number % 3],
        COST: 0.8,
    }
    pruned = number % 10 == 9
    value = None if pruned else 70 - 40 * number / trials + float(rng.exponential(2.0))
    trial = create_trial(state=TrialState.PRUNED if pruned else TrialState.COMPLETE, value=value, user_attrs=attrs)
    trial.system_attrs = {SCORE: {"run": 1000 + number % 7, "saved": 500}}
    trial.number = number
    return trial


def _best(trial: FrozenTrial) -> Best:
    candidate = Candidate.from_key(trial.user_attrs[CANDIDATE])
    return Best("best found", candidate, 0.8, trial.values[0], None, trial.number, None)
