"""Solver, guidance and timesteps searched together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache

import optuna
import pytest
from optuna.samplers import BaseSampler
from search_spaces import SPACES

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace

SOLVERS = {"ddim": 3.0, "plms": 2.0, "heun": 2.5, "dpmpp": 0.0, "deis": 1.0}  # how much worse than the best
SPACE = SearchSpace(
    1000, 4, 4, choices={"solver": tuple(SOLVERS), "final": ("zero", "sigma_min")}, ranges={"guidance": (1.0, 8.0)}
)
TARGET = (930, 700, 420, 130)


def score(candidate: Candidate) -> float:
    """0 at TARGET, dpmpp, final "sigma_min" and guidance 3.2; each solver has timesteps of its own."""
    solver = str(candidate.settings_dict["solver"])
    shift = 10 * list(SOLVERS).index(solver) - 30
    steps = sum(((t - goal - shift) / 100) ** 2 for t, goal in zip(candidate.timesteps, TARGET, strict=True))
    final = 0.7 * (candidate.settings_dict["final"] == "zero")
    return SOLVERS[solver] + steps + final + (float(candidate.settings_dict["guidance"]) - 3.2) ** 2


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "adopt": lambda seed: AutoDiffusionSampler(SPACE, seed=seed),
    "paper": lambda seed: AutoDiffusionSampler(SPACE, preset="paper", seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


@cache
def winners(name: str) -> tuple[Candidate, ...]:
    """Best candidate of 200 trials, for each of four seeds."""
    found = []
    for seed in range(4):
        study = optuna.create_study(sampler=SAMPLERS[name](seed))
        study.optimize(lambda trial: score(SPACE.suggest(trial)), n_trials=200)
        found.append(SPACE.decode(study.best_trial.params))
    return tuple(found)


def hits(name: str) -> int:
    """Winners with the best solver and a guidance near the best one."""
    settings = [winner.settings_dict for winner in winners(name)]
    return sum(s["solver"] == "dpmpp" and abs(float(s["guidance"]) - 3.2) < 0.3 for s in settings)


@pytest.mark.parametrize("preset", [pytest.param("adopt", marks=pytest.mark.slow), "paper"])
def test_the_best_settings_are_found_more_often_than_at_random(preset: str) -> None:
    assert hits(preset) > hits("random")
    losses, at_random = (sum(map(score, winners(name))) / 4 for name in (preset, "random"))
    assert losses < 0.7 * at_random


def test_ours_finds_them_nearly_always() -> None:
    assert hits("adopt") >= 3
    assert sum(map(score, winners("adopt"))) / 4 < 0.5


def test_parents_are_not_all_of_the_solver_that_leads() -> None:
    sampler = AutoDiffusionSampler(SPACE, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: score(SPACE.suggest(trial)), n_trials=120)
    solver_of = [SPACE.decode(trial.params).settings_dict["solver"] for trial in study.trials]
    parents = Counter(solver_of[p] for number in range(60, 120) for p in sampler.proposal(study, number).parents)
    assert len(parents) >= 3
    assert parents.most_common(1)[0][1] > 0.4 * parents.total()


def test_uniform_takes_the_default_settings() -> None:
    space = SPACES["solvers"]
    study = optuna.create_study(sampler=AutoDiffusionSampler(space, population_size=8))
    first = space.suggest(study.ask())
    assert first.settings_dict == space.default_settings == {"solver": "ddim"}
    assert first.steps == space.full_steps == 8


@pytest.mark.parametrize("name", ["adopt", "paper"])
def test_another_sampler_goes_on_from_trials_of_a_foreign_one(name: str) -> None:
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: score(SPACE.suggest(trial)), n_trials=30)
    sampler = AutoDiffusionSampler(SPACE, preset=name, population_size=10)
    heir = optuna.create_study(sampler=sampler)
    heir.add_trials(study.trials)
    heir.optimize(lambda trial: score(SPACE.suggest(trial)), n_trials=30)
    bred = [sampler.proposal(heir, number) for number in range(30, 60)]
    assert any(parent < 30 for proposal in bred for parent in proposal.parents)
    assert len({proposal.candidate.key for proposal in bred}) == 30
    assert heir.best_value < study.best_value


def test_too_expensive_solvers_are_tried_once_skips_are_open() -> None:
    space = SPACES["heun with skips"]
    sampler = AutoDiffusionSampler(space, population_size=8, stage_one_generations=2)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: float(space.suggest(trial).settings_dict["solver"] == "ddim"), n_trials=80)
    proposals = [sampler.proposal(study, number) for number in range(80)]
    assert {p.candidate.settings_dict["solver"] for p in proposals if p.stage == 1} == {"ddim"}
    assert "heun" in {p.candidate.settings_dict["solver"] for p in proposals if p.stage == 2}
    assert all(space.cost(p.candidate) <= 5.5 + 1e-9 for p in proposals)
