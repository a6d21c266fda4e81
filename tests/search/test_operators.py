from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from search_spaces import SETTINGS, SPACES, units
from skip_masks import skips

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.search.operators import (
    crossover_prefix,
    crossover_uniform,
    mutate_local,
    mutate_paper,
    random_candidate,
)
from autodiffusion_optuna.search.space import SearchSpace

Operator = Callable[[Generator, SearchSpace, Candidate, Candidate, float], Candidate]
OPERATORS: dict[str, Operator] = {
    "random": lambda rng, space, a, b, skip_ratio: random_candidate(rng, space, skip_ratio),
    "paper": lambda rng, space, a, b, skip_ratio: mutate_paper(rng, space, a, skip_ratio, 0.25),
    "rare": lambda rng, space, a, b, skip_ratio: mutate_paper(rng, space, a, skip_ratio, 1e-9),
    "local": lambda rng, space, a, b, skip_ratio: mutate_local(rng, space, a, skip_ratio),
    "uniform": crossover_uniform,
    "prefix": crossover_prefix,
}
MUTATIONS = ("paper", "rare", "local")
NAMES = st.sampled_from(sorted(SPACES))
SEEDS = st.integers(0, 2**31)
PARTS = st.sampled_from([0.0, 0.3, 1.0])  # of max_skip


@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=150, deadline=None)
@given(NAMES, SEEDS, PARTS)
def test_children_are_canonical_within_the_skip_ratio_and_repeatable(
    operator: str, name: str, seed: int, part: float
) -> None:
    space = SPACES[name]
    skip_ratio = part * space.max_skip
    rng = np.random.default_rng(seed)
    first, second = (random_candidate(rng, space, space.max_skip) for _ in range(2))
    child = OPERATORS[operator](np.random.default_rng(seed), space, first, second, skip_ratio)
    assert space.is_canonical(child)
    assert all(skip.bit_count() <= space.open_limit(skip_ratio) for skip in child.modes)
    assert child == OPERATORS[operator](np.random.default_rng(seed), space, first, second, skip_ratio)


@pytest.mark.parametrize("operator", MUTATIONS)
@settings(max_examples=150, deadline=None)
@given(NAMES, SEEDS, PARTS)
def test_a_mutation_changes_something(operator: str, name: str, seed: int, part: float) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(seed)
    skip_ratio = part * space.max_skip
    parent = random_candidate(rng, space, skip_ratio)
    assert OPERATORS[operator](rng, space, parent, parent, skip_ratio) != parent


@pytest.mark.parametrize("operator", ["uniform", "prefix"])
@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_skips_follow_their_timestep_through_crossover(operator: str, seed: int) -> None:
    space = SPACES["skips"]
    rng = np.random.default_rng(seed)
    # Distinct multiples of ten: repair has nothing to move, so each pair must come whole from a parent.
    first, second = (
        Candidate(
            tuple(sorted((10 * rng.permutation(100)[:6]).tolist(), reverse=True)),
            random_candidate(rng, space, 0.2).modes,
        )
        for _ in range(2)
    )
    child = OPERATORS[operator](rng, space, first, second, 0.2)
    whole = set(first.pairs) | set(second.pairs)
    moved = [pair for pair in child.pairs if pair not in whole]
    assert all(t % 10 for t, _ in moved), "a pair was torn apart"
    assert {skip for _, skip in child.pairs} <= {skip for _, skip in whole}


def test_crossover_takes_about_half_from_each_parent() -> None:
    space, rng = SPACES["skips"], np.random.default_rng(0)
    first = Candidate(tuple(range(900, 300, -100)))
    second = Candidate(tuple(range(850, 250, -100)))
    from_first = [
        len(set(crossover_uniform(rng, space, first, second, 0).timesteps) & set(first.timesteps)) for _ in range(400)
    ]
    assert 2.7 < np.mean(from_first) < 3.3


def test_crossover_of_repeated_timesteps_keeps_the_number_of_steps() -> None:
    space, rng = SPACES["fixed"], np.random.default_rng(0)
    for _ in range(100):
        child = crossover_uniform(rng, space, Candidate((9, 8, 7, 6)), Candidate((8, 7, 6, 5)), 0)
        assert child.steps == 4


def test_crossover_of_different_lengths_has_the_length_of_a_parent() -> None:
    space, rng = SPACES["range"], np.random.default_rng(0)
    short, long = Candidate((900, 500, 100)), Candidate((950, 850, 750, 650, 550, 450, 350))
    for cross in (crossover_uniform, crossover_prefix):
        lengths = {cross(rng, space, *pair, 0).steps for pair in [(short, long), (long, short)] * 50}
        assert lengths == {3, 7}


def test_prefix_crossover_shares_the_first_steps_and_is_neither_parent() -> None:
    space, rng = SPACES["skips"], np.random.default_rng(0)
    for _ in range(200):
        first, second = (random_candidate(rng, space, 0.2) for _ in range(2))
        child = crossover_prefix(rng, space, first, second, 0.2)
        if child.timesteps[-1] > 0:  # nothing was pushed against the end of the grid
            assert child.pairs[0] == first.pairs[0]
        assert child not in (first, second)


@pytest.mark.parametrize("steps", [4, 10])
def test_replaced_genes_are_binomial_given_one(steps: int) -> None:
    space, rng = SearchSpace(1000, steps, steps), np.random.default_rng(0)
    parent = Candidate(tuple(range(999 - 50, 0, -(900 // steps)))[:steps])
    changed = np.array(
        [steps - len({*parent.timesteps} & {*mutate_paper(rng, space, parent, 0, 0.25).timesteps}) for _ in range(4000)]
    )
    expected = steps * 0.25 / (1 - 0.75**steps)
    assert changed.min() == 1
    assert abs(changed.mean() - expected) < 0.05
    one = steps * 0.25 * 0.75 ** (steps - 1) / (1 - 0.75**steps)
    assert abs((changed == 1).mean() - one) < 0.03


def test_paper_mutation_changes_skip_sets_in_stage_two() -> None:
    space, rng = SPACES["skips"], np.random.default_rng(0)
    parent = Candidate((900, 700, 500, 300, 200, 100), tuple(map(skips, (3, 5, 9, 17, 33, 65))))
    kept = np.zeros(6)
    for _ in range(1000):
        child = dict(mutate_paper(rng, space, parent, 0.2, 0.25).pairs)
        kept += [child.get(t) == skip for t, skip in parent.pairs]
    # Both genes of a step stay with 0.75^2, a little less given that one of twelve changes.
    assert np.all(np.abs(kept / 1000 - 0.75**2) < 0.07)


def test_local_moves_are_mostly_small_and_late() -> None:
    space, rng = SearchSpace(1000, 5, 5), np.random.default_rng(0)
    parent = Candidate((900, 700, 500, 300, 100))
    moved, distances = Counter[int](), []
    for _ in range(2000):
        child = mutate_local(rng, space, parent, 0)
        gone = [k for k in range(5) if parent.timesteps[k] not in child.timesteps]
        assert 1 <= len(gone) <= 2
        moved.update(gone)
        distances += [min(abs(t - parent.timesteps[k]) for t in child.timesteps) for k in gone]
    assert moved[4] > 3 * moved[0] > 0
    assert np.median(distances) < 40
    assert max(distances) > 150


def test_local_moves_of_skip_sets_flip_exchange_and_copy() -> None:
    space, rng = SPACES["skips"], np.random.default_rng(0)
    parent = Candidate((900, 700, 500, 300, 200, 100), tuple(map(skips, (3, 5, 9, 17, 33, 65))))
    seen = Counter[str]()
    for _ in range(1000):
        child = mutate_local(rng, space, parent, 0.2)
        different = [k for k in range(6) if child.modes[k] != parent.modes[k]]
        if child.timesteps == parent.timesteps and len(different) == 1:
            k = different[0]
            neighbours = [parent.modes[n] for n in (k - 1, k + 1) if 0 <= n < 6]
            seen["copy" if child.modes[k] in neighbours else "flip"] += 1
        elif child.timesteps == parent.timesteps and sorted(child.modes) == sorted(parent.modes):
            seen["exchange"] += 1
    assert min(seen[kind] for kind in ("copy", "flip", "exchange")) > 20


def test_local_moves_change_the_number_of_steps_where_it_is_open() -> None:
    space, rng = SPACES["range"], np.random.default_rng(0)
    parent = Candidate((900, 700, 500, 300, 100))
    lengths = Counter(mutate_local(rng, space, parent, 0).steps for _ in range(500))
    assert set(lengths) == {4, 5, 6}
    assert lengths[5] > 300


def test_random_candidates_cover_the_space() -> None:
    rng = np.random.default_rng(0)
    small = SearchSpace(6, 2, 3, min_gap=2)
    everything = {random_candidate(rng, small, 0).key for _ in range(2000)}
    assert len(everything) == 10 + 4  # two of six times two apart, and three
    space = SPACES["skips"]
    counts = Counter(s.bit_count() for _ in range(300) for s in random_candidate(rng, space, 0.2).modes)
    assert set(counts) == set(range(9))


def test_a_space_of_one_candidate_does_not_hang() -> None:
    space, rng = SearchSpace(3, 3, 3, units=units(1)), np.random.default_rng(0)
    only = Candidate((2, 1, 0))
    for operator in OPERATORS.values():
        assert operator(rng, space, only, only, 0) == only


@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), SEEDS, PARTS)
def test_children_have_every_setting_and_keep_the_budget(operator: str, name: str, seed: int, part: float) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(seed)
    first, second = (random_candidate(rng, space, space.max_skip) for _ in range(2))
    child = OPERATORS[operator](rng, space, first, second, part * space.max_skip)
    assert [setting for setting, _ in child.settings] == sorted([*space.choices, *space.ranges])
    if space.max_cost is not None:
        assert space.cost(child) <= space.max_cost + 1e-9
        doubled = child.settings_dict.get("solver") == "heun"
        assert len(space.visits(child.steps, child.settings_dict)) == (2 * child.steps - 1 if doubled else child.steps)


@pytest.mark.parametrize("name", ["solvers", "heun with skips", "all open"])
def test_every_solver_is_reached_at_its_own_cost(name: str) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    drawn = [random_candidate(rng, space, space.max_skip) for _ in range(200)]
    seen = Counter(candidate.settings_dict["solver"] for candidate in drawn)
    assert set(seen) == set(space.choices["solver"])
    assert min(seen.values()) > 0.7 * 200 / len(seen)


def test_paper_mutation_treats_each_setting_as_one_more_gene() -> None:
    space, rng = SPACES["settings"], np.random.default_rng(0)
    parent = Candidate((900, 700, 500, 300), settings=space.fit(Candidate((9, 8, 7, 6)), 0).settings)
    kept = Counter[str]()
    for _ in range(2000):
        child = mutate_paper(rng, space, parent, 0, 0.25)
        kept.update(name for name, value in child.settings if value == parent.settings_dict[name])
    # Eight genes, given that one changes; eta has only 51 values, and a redraw may be the same.
    changed = 0.25 / (1 - 0.75**8)
    assert all(abs(1 - kept[name] / 2000 - changed) < 0.035 for name in space.default_settings)


def test_local_moves_change_one_setting_or_none() -> None:
    space, rng = SPACES["settings"], np.random.default_rng(0)
    parent = space.fit(Candidate((900, 700, 500, 300)), 0)
    moved, distances = Counter[str](), []
    for _ in range(3000):
        child = mutate_local(rng, space, parent, 0)
        names = [name for name, value in child.settings if value != parent.settings_dict[name]]
        assert len(names) == (child.timesteps == parent.timesteps)
        moved.update(names or ["time"])
        if names == ["guidance"]:
            distances.append(abs(float(child.settings_dict["guidance"]) - 4.5))
    assert 0.3 < 1 - moved["time"] / 3000 < 0.4
    assert min(moved[name] for name in space.default_settings) > 0.2 * (3000 - moved["time"])
    assert np.median(distances) < 1.0  # a fine move is as likely as a coarse one
    assert max(distances) > 3.0


def test_crossover_takes_settings_of_either_parent() -> None:
    space, rng = SPACES["settings"], np.random.default_rng(0)
    ends = {"eta": (0.0, 0.05), "final": ("zero", "sigma_min"), "guidance": (1.0, 8.0), "solver": ("ddim", "heun")}
    first, second = (
        Candidate((900, 700, 500, 300), settings=tuple((name, pair[k]) for name, pair in ends.items())) for k in (0, 1)
    )
    uniform = Counter[str]()
    whole = 0
    for _ in range(1000):
        child = crossover_uniform(rng, space, first, second, 0)
        uniform.update(name for name, pair in ends.items() if child.settings_dict[name] == pair[0])
        prefixed = crossover_prefix(rng, space, first, second, 0)
        assert all(value in ends[name] for name, value in (*child.settings, *prefixed.settings))
        whole += prefixed.settings == first.settings
    assert all(430 < uniform[name] < 570 for name in ends)
    assert 0.71 < whole / 1000 < 0.83  # three quarters, and a sixteenth of the rest
