"""Serial runs of the search with a stub score."""

from __future__ import annotations

from typing import Any

import optuna
from search_spaces import SPACES

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace

SPACE = SPACES["budget"]


def score(candidate: Candidate) -> float:
    steps = sum(abs(t - 500) for t in candidate.timesteps) + sum(s % 97 for s in candidate.modes)
    return steps + sum(len(v) if isinstance(v, str) else v for _, v in candidate.settings)


def go(study: optuna.Study, trials: int, space: SearchSpace = SPACE) -> list[str]:
    """Run ``trials`` more; the keys of their candidates."""
    keys = []
    for _ in range(trials):
        trial = study.ask()
        candidate = space.suggest(trial)
        study.tell(trial, score(candidate))
        keys.append(candidate.key)
    return keys


def fresh(seed: int = 0, space: SearchSpace = SPACE, **settings: Any) -> optuna.Study:
    settings = {"population_size": 8, **settings}
    return optuna.create_study(sampler=AutoDiffusionSampler(space, seed=seed, **settings))


def sampler_of(study: optuna.Study) -> AutoDiffusionSampler:
    assert isinstance(study.sampler, AutoDiffusionSampler)
    return study.sampler
