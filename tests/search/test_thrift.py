"""What children cost, given the first steps that were tried, and how that weighs in the choice among them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from search_runs import fresh, go
from search_spaces import SPACES, heun_visits
from skip_masks import skips

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search import surrogate, thrift
from autodiffusion_optuna.search.history import Record
from autodiffusion_optuna.search.operators import mutate_local, random_candidate
from autodiffusion_optuna.search.space import SearchSpace

SPACE = SearchSpace(1000, 4, 4, units=("a", "b", "c"), max_skip=0.7)
PARENT = Candidate((900, 600, 300, 50), tuple(map(skips, (0, 1, 0, 2))))


def records(candidates: list[Candidate]) -> list[Record]:
    return [Record((float(n),), n, c.key, c) for n, c in enumerate(candidates)]


@pytest.mark.parametrize(
    ("timesteps", "masks", "left"),
    [
        ((900, 600, 300, 50), (0, 1, 0, 2), 0.25),  # the same again: nobody keeps the last one
        ((900, 600, 300, 20), (0, 1, 0, 2), 0.25),
        ((900, 600, 300, 50), (0, 1, 4, 2), 0.5),
        ((900, 500, 300, 50), (0, 1, 0, 2), 0.75),
        ((900, 600, 300, 50), (1, 1, 0, 2), 1.0),
        ((901, 600, 300, 50), (0, 1, 0, 2), 1.0),
    ],
)
def test_a_child_costs_what_follows_the_steps_it_shares(
    timesteps: tuple[int, ...], masks: tuple[int, ...], left: float
) -> None:
    others = [Candidate((999, 600, 300, 50)), PARENT, Candidate((100, 60, 30, 5))]
    assert thrift.costs_left([Candidate(timesteps, tuple(map(skips, masks)))], records(others), SPACE) == [left]


def test_a_stopped_candidate_kept_the_steps_of_its_few_images_alone() -> None:
    stopped = [record._replace(stopped=True) for record in records([PARENT])]
    assert thrift.costs_left([PARENT], stopped, SPACE) == [1.0]


def test_other_settings_and_other_numbers_of_steps_share_nothing() -> None:
    space = SPACES["solvers"]
    tried = records([Candidate((900, 600, 300), settings=(("solver", "ddim"),))])
    children = [
        Candidate((900, 600, 100), settings=(("solver", "ddim"),)),
        Candidate((900, 600, 100), settings=(("solver", "dpmpp"),)),
        Candidate((900, 600, 300, 100), settings=(("solver", "ddim"),)),
    ]
    assert list(thrift.costs_left(children, tried, space)) == pytest.approx([1 / 3, 1, 1])


def test_a_solver_that_looks_ahead_needs_what_it_sees_there() -> None:
    space = SearchSpace(1000, 3, 3, visits=heun_visits)
    tried = records([Candidate((900, 600, 300))])
    # Heun asks at steps 0 1 1 2 2: with two steps shared, three evaluations are.
    children = [Candidate((900, 600, 200)), Candidate((900, 500, 300)), Candidate((900, 600, 300))]
    assert list(thrift.costs_left(children, tried, space)) == pytest.approx([2 / 5, 4 / 5, 1 / 5])


def test_it_is_what_an_exhaustive_search_for_the_longest_beginning_finds() -> None:
    rng = np.random.default_rng(0)
    tried = [PARENT]
    for _ in range(60):
        tried.append(mutate_local(rng, SPACE, tried[int(rng.integers(len(tried)))], 0.7))
    children = [mutate_local(rng, SPACE, tried[int(rng.integers(61))], 0.7) for _ in range(200)]
    longest = [
        max(
            sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(child.pairs, other.pairs, strict=True)))
            for other in tried
        )
        for child in children
    ]
    assert list(thrift.costs_left(children, records(tried), SPACE)) == [1 - min(n, 3) / 4 for n in longest]
    assert len(set(longest)) > 3


def test_what_was_tried_long_ago_is_forgotten() -> None:
    rng = np.random.default_rng(0)
    later = [random_candidate(rng, SPACE, 0.7) for _ in range(thrift.LATELY)]
    ranked = records([PARENT, *later])  # its value is the best, so it stands first
    assert thrift.costs_left([PARENT], ranked[:-1], SPACE) == [0.25]
    assert thrift.costs_left([PARENT], ranked, SPACE) == [1.0]


def test_the_thrifty_choice_costs_less_and_no_weight_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    known = records([random_candidate(rng, SPACE, 0.0) for _ in range(40)])
    costs = []
    for weight in (0.0, 1.0, 100.0):
        chosen = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            children = [mutate_local(rng, SPACE, record.candidate, 0.0) for record in known[:24]]
            chosen.append(surrogate.choose(children, known, SPACE, weight))
            if weight == 100.0:
                assert thrift.costs_left(chosen[-1:], known, SPACE) == thrift.costs_left(children, known, SPACE).min()
        costs.append(thrift.costs_left(chosen, known, SPACE).mean())
    assert costs[0] > costs[1] >= costs[2]


def test_a_thrifty_search_costs_less_from_its_second_generation_on() -> None:
    space = SPACES["fixed"]
    costs = {}
    for thrifty in (False, True):
        candidates = [Candidate.from_key(key) for key in go(fresh(space=space, thrifty=thrifty), 48, space)]
        tried = records(candidates)
        costs[thrifty] = [float(thrift.costs_left([c], tried[:n], space)[0]) for n, c in enumerate(candidates)]
    assert costs[True][:8] == costs[False][:8]
    assert sum(costs[True][8:]) < sum(costs[False][8:]) - 2


def test_the_published_search_is_not_thrifty() -> None:
    space = SPACES["fixed"]
    plain, thrifty = (go(fresh(space=space, preset="paper", thrifty=t), 32, space) for t in (False, True))
    assert plain == thrifty
