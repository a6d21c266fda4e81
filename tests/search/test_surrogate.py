from __future__ import annotations

import math

import numpy as np
import pytest

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search import surrogate
from autodiffusion_optuna.search.history import Record
from autodiffusion_optuna.search.operators import random_candidate
from autodiffusion_optuna.search.space import SearchSpace

STEPS = SearchSpace(T=1000, min_steps=4, max_steps=4)
RANGE = SearchSpace(T=1000, min_steps=2, max_steps=5, units=("a", "b", "c"), unit_costs=(0.2, 0.1, 0.1), max_skip=0.7)
TARGET = np.array([900, 600, 300, 50])
SETTINGS = SearchSpace(
    T=1000, min_steps=4, max_steps=4, choices={"solver": ("a", "b", "c")}, ranges={"guidance": (1.0, 8.0)}
)


def loss(candidate: Candidate) -> float:
    return float(((np.array(candidate.timesteps) - TARGET) ** 2).sum())


def trials(candidates: list[Candidate], losses: list[float]) -> list[Record]:
    return [Record((value,), n, c.key, c) for n, (c, value) in enumerate(zip(candidates, losses, strict=True))]


def drawn(space: SearchSpace, count: int, seed: int, skip_ratio: float = 0.0) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    return list(dict.fromkeys(random_candidate(rng, space, skip_ratio) for _ in range(count)))


def test_the_guess_is_right_at_what_is_known_and_unsure_far_away() -> None:
    known = drawn(STEPS, 60, 0)
    scores = surrogate.normal_scores([loss(c) for c in known])
    points = surrogate.embed(known, STEPS)
    mean, deviation = surrogate.predict(points, scores, points)
    assert np.corrcoef(mean, scores)[0, 1] > 0.99
    far = surrogate.embed([Candidate((3, 2, 1, 0))], STEPS)
    assert surrogate.predict(points, scores, far)[1][0] > deviation.mean()


def test_it_ranks_children_it_has_not_seen() -> None:
    known, children = drawn(STEPS, 80, 1), drawn(STEPS, 60, 2)
    scores = surrogate.normal_scores([loss(c) for c in known])
    mean, _ = surrogate.predict(surrogate.embed(known, STEPS), scores, surrogate.embed(children, STEPS))
    assert np.corrcoef(mean, surrogate.normal_scores([loss(c) for c in children]))[0, 1] > 0.8


def test_the_choice_is_far_better_than_chance() -> None:
    known = drawn(STEPS, 80, 3)
    complete = trials(known, [loss(c) for c in known])
    ranks = []
    for seed in range(10, 20):
        children = drawn(STEPS, 32, seed)
        chosen = surrogate.choose(children, complete, STEPS)
        ranks.append(sorted(children, key=loss).index(chosen))
    assert np.mean(ranks) < 5  # chance: 15.5


def test_too_little_is_known_to_choose() -> None:
    children = drawn(STEPS, 5, 0)
    few = drawn(STEPS, surrogate.ENOUGH - 1, 1)
    assert surrogate.choose(children, trials(few, [loss(c) for c in few]), STEPS) == children[0]


@pytest.mark.parametrize(
    "losses",
    [[1.0] * 20, [math.inf] * 20, [math.inf] * 10 + [1.0] * 10, [-1e300, 1e300] * 10],
    ids=["equal", "infinite", "half infinite", "huge"],
)
def test_any_losses_give_a_choice(losses: list[float]) -> None:
    known = drawn(RANGE, 40, 0, 0.7)[: len(losses)]
    children = drawn(RANGE, 10, 1, 0.7)
    assert surrogate.choose(children, trials(known, losses), RANGE) in children


def test_one_candidate_evaluated_again_and_again_gives_a_choice() -> None:
    same = [Candidate((9, 5, 2, 0))] * 20
    children = drawn(STEPS, 4, 0)
    assert surrogate.choose(children, trials(same, [float(i) for i in range(20)]), STEPS) in children


def test_skips_and_lengths_are_told_apart() -> None:
    points = surrogate.embed([Candidate((9, 2)), Candidate((9, 2), (1, 0)), Candidate((9, 5, 2))], RANGE)
    assert (points.times[0] == points.times[1]).all()
    assert (points.modes[0] != points.modes[1]).any()
    assert (points.times[0] != points.times[2]).any()


def test_the_number_of_fitted_trials_is_bounded() -> None:
    ranked = sorted(trials([Candidate((n,)) for n in range(5000)], [float(n % 997) for n in range(5000)]))
    fitted = surrogate.fitted(ranked)
    assert len(fitted) == surrogate.KEPT_BEST + surrogate.KEPT_OTHERS
    assert fitted[: surrogate.KEPT_BEST] == ranked[: surrogate.KEPT_BEST]
    assert fitted[-1] == ranked[-1]
    assert surrogate.fitted(ranked[:7]) == ranked[:7]


def test_settings_are_told_apart() -> None:
    times = (9, 5, 2, 0)
    values = [("a", 1.0), ("b", 1.0), ("a", 8.0), ("c", 4.5)]
    points = surrogate.embed([Candidate(times, settings=(("guidance", g), ("solver", s))) for s, g in values], SETTINGS)
    assert points.choices.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert points.numbers.tolist() == [[0], [0], [1], [0.5]]
    plain = surrogate.embed([Candidate(times)], STEPS)
    assert (plain.choices.shape, plain.numbers.shape) == ((1, 0), (1, 0))
    distances = surrogate.distances(points, points)
    assert distances[2].tolist() == [[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]
    assert distances[3][0].tolist() == [0, 0, 1, 0.5]


def test_settings_that_are_equal_leave_the_guess_as_it_is() -> None:
    known, children = drawn(STEPS, 40, 0), drawn(STEPS, 10, 1)
    scores = surrogate.normal_scores([loss(c) for c in known])
    plain = surrogate.predict(surrogate.embed(known, STEPS), scores, surrogate.embed(children, STEPS))
    equal = surrogate.predict(surrogate.embed(known, SETTINGS), scores, surrogate.embed(children, SETTINGS))
    assert np.array_equal(plain, equal)  # missing settings are the defaults


def test_it_learns_which_solver_and_guidance_are_best() -> None:
    def with_settings(candidate: Candidate) -> float:
        solver = {"a": 0.0, "b": 1.0, "c": 2.0}[str(candidate.settings_dict["solver"])]
        return loss(candidate) / 3e5 + solver + (float(candidate.settings_dict["guidance"]) - 3.0) ** 2 / 5

    known, children = drawn(SETTINGS, 100, 1), drawn(SETTINGS, 60, 2)
    scores = surrogate.normal_scores([with_settings(c) for c in known])
    mean, _ = surrogate.predict(surrogate.embed(known, SETTINGS), scores, surrogate.embed(children, SETTINGS))
    true = surrogate.normal_scores([with_settings(c) for c in children])
    blind, _ = surrogate.predict(surrogate.embed(known, STEPS), scores, surrogate.embed(children, STEPS))
    assert np.corrcoef(mean, true)[0, 1] > 0.75
    assert np.corrcoef(mean, true)[0, 1] > np.corrcoef(blind, true)[0, 1] + 0.2
