"""Who is stopped by the race, and who is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from search_runs import fresh, sampler_of
from search_spaces import SPACES

from autodiffusion_optuna import RacePruner
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.race import is_worse
from autodiffusion_optuna.storage.attrs import SCREEN

SPACE = SPACES["fixed"]
TARGET = (800, 550, 400, 250)


def ended(rungs: Mapping[int, float], value: float, by_image: Sequence[float] | None = None) -> FrozenTrial:
    attrs = {} if by_image is None else {SCREEN: list(by_image)}
    return create_trial(value=value, intermediate_values=dict(rungs), system_attrs=attrs)


def study_of(*trials: FrozenTrial, direction: str = "minimize") -> optuna.Study:
    study = optuna.create_study(direction=direction, pruner=RacePruner())
    study.add_trials(trials)
    return study


def stops(
    study: optuna.Study, step: int, value: float, by_image: Sequence[float] | None = None, **settings: int
) -> bool:
    trial = create_trial(state=TrialState.RUNNING, intermediate_values={step: value})
    trial.system_attrs = {} if by_image is None else {SCREEN: list(by_image)}
    trial.number = len(study.trials)
    return RacePruner(**settings).prune(study, trial)


GOOD = [ended({32: 5.0 * value}, value) for value in (8.0, 9.0, 14.0, 25.0, 60.0)]


def test_the_first_trials_are_never_stopped() -> None:
    for complete in range(3):
        assert not stops(study_of(*GOOD[:complete]), 32, 1e9)


def test_a_trial_without_a_chance_is_stopped_and_any_other_is_not() -> None:
    study = study_of(*GOOD)
    assert [stops(study, 32, 5 * value) for value in (7.0, 9.0, 10.0, 40.0, 200.0)] == [False, False, False, True, True]


def test_the_step_that_was_reported_decides() -> None:
    trials = [ended({32: 60.0, 128: value}, value) for value in (8.0, 9.0, 14.0, 25.0, 60.0)]
    assert not stops(study_of(*trials), 32, 1e9)
    assert stops(study_of(*trials), 128, 60.0)
    assert not stops(study_of(*trials), 64, 1e9)  # which no other reported


@pytest.mark.parametrize("seed", range(5))
def test_a_step_that_says_nothing_of_the_end_stops_nobody(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = [ended({32: float(rng.lognormal())}, float(rng.lognormal())) for _ in range(40)]
    assert not stops(study_of(*trials), 32, 1000.0)


def test_larger_is_better_where_the_study_maximises() -> None:
    trials = [ended({32: 5.0 * value}, value) for value in np.linspace(1, 60, 12).tolist()]
    study = study_of(*trials, direction="maximize")
    assert stops(study, 32, 5.0)
    assert not stops(study, 32, 310.0)


def test_values_may_be_negative() -> None:
    trials = [ended({32: 2 * value}, value) for value in np.linspace(-1, 5, 12).tolist()]
    assert stops(study_of(*trials), 32, 8.0)
    assert not stops(study_of(*trials), 32, -2.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_stopped(value: float) -> None:
    assert stops(study_of(*GOOD), 32, value)


def test_the_best_few_are_more_where_more_are_complete() -> None:
    """Second best is not stopped by a best that stands apart, once eight are complete."""
    trials = [ended({32: 5 * value}, value) for value in (1.0, *np.linspace(10, 60, 11).tolist())]
    assert stops(study_of(*trials[:6]), 32, 50.0)
    assert not stops(study_of(*trials), 32, 50.0)


def images(mean: float, rng: np.random.Generator, spread: float) -> list[float]:
    return [float(x) for x in mean + spread * rng.standard_normal(32)]


def test_at_the_screen_a_trial_must_be_worse_image_by_image() -> None:
    rng = np.random.default_rng(0)
    shared = 30 * rng.standard_normal(32)  # what the images have in common
    trials = [
        ended({32: 5 * v}, v, (5 * v + shared + rng.standard_normal(32)).tolist()) for v in (8.0, 9.0, 14.0, 25.0, 60.0)
    ]
    study = study_of(*trials)
    assert stops(study, 32, 90.0, (90 + shared + rng.standard_normal(32)).tolist())
    assert not stops(study, 32, 90.0, images(90.0, rng, 400.0))
    assert stops(study, 32, 90.0)  # which has no values by image


def test_images_are_compared_in_pairs() -> None:
    worse, equal = ended({3: 2.0}, 2.0, [2, 2, 2]), ended({3: 2.0}, 2.0, [1, 1, 4])
    better = ended({3: 1.0}, 1.0, [1, 1, 1])
    assert is_worse(worse, better, 3)
    assert not is_worse(better, worse, 3)
    assert not is_worse(better, better, 3)
    assert not is_worse(equal, better, 3)
    assert is_worse(better, worse, 3, sign=-1.0)
    assert is_worse(equal, better, 64)  # of another step than the images are


def test_with_generations_only_earlier_ones_count() -> None:
    study = study_of(*GOOD)
    assert not stops(study, 32, 1e3, generation=8)
    assert stops(study, 32, 1e3, generation=5)
    study.add_trial(create_trial(state=TrialState.FAIL))
    study.add_trials(GOOD[:3])
    assert stops(study, 32, 1e3, generation=4)  # index 8 of trial 9, and four before it


def test_a_doubt_is_a_small_chance() -> None:
    for doubt in (0.0, 0.5):
        with pytest.raises(ConfigError, match="must be in"):
            RacePruner(doubt=doubt)


def loss(candidate: Candidate) -> float:
    return 8.0 + sum(abs(t - goal) for t, goal in zip(candidate.timesteps, TARGET, strict=True)) / 20


def objective(calls: list[int]) -> Callable[[optuna.Trial], float]:
    def score(trial: optuna.Trial) -> float:
        candidate = SPACE.suggest(trial)
        noise = np.random.default_rng(abs(hash(candidate.timesteps)) % 2**32).normal(size=2)
        for step, rung in ((32, 4 * math.exp(0.1 * noise[0])), (128, math.exp(0.03 * noise[1]))):
            calls.append(step)
            trial.report(rung * loss(candidate), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        calls.append(256)
        return loss(candidate)

    return score


def test_through_optunas_own_road_it_saves_most_and_finds_as_much() -> None:
    calls: list[int] = []
    study = fresh(space=SPACE, population_size=20)
    study.pruner = RacePruner()
    study.optimize(objective(calls), n_trials=80)
    plain = fresh(space=SPACE, population_size=20)
    plain.optimize(lambda trial: loss(SPACE.suggest(trial)), n_trials=80)
    assert study.best_value < plain.best_value * 1.15
    states = [t.state for t in study.trials]
    assert states.count(TrialState.PRUNED) >= 15
    assert calls.count(256) == states.count(TrialState.COMPLETE)


def test_none_is_bred_from_a_stopped_trial() -> None:
    study = fresh(space=SPACE, population_size=20)
    study.pruner = RacePruner()
    study.optimize(objective([]), n_trials=50)
    stopped = {t.number for t in study.trials if t.state == TrialState.PRUNED}
    parents = {parent for number in range(50) for parent in sampler_of(study).proposal(study, number).parents}
    assert parents
    assert stopped
    assert not stopped & parents
