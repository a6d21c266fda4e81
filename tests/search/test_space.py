from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from search_spaces import COSTS, SETTINGS, SPACES, heun_visits, solver_visits, units
from skip_masks import skips

from autodiffusion_optuna.candidate import REUSE, Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.operators import random_candidate
from autodiffusion_optuna.search.space import SearchSpace

NAMES = st.sampled_from(sorted(SPACES))
SEEDS = st.integers(0, 2**31)


def drawn(rng: np.random.Generator, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, IntDistribution):
        return int(rng.integers(distribution.low, distribution.high, endpoint=True))
    if isinstance(distribution, FloatDistribution):
        return float(rng.uniform(distribution.low, distribution.high))
    assert isinstance(distribution, CategoricalDistribution)
    return distribution.choices[int(rng.integers(len(distribution.choices)))]


def garbage(space: SearchSpace, seed: int) -> dict[str, Any]:
    """Raw values of a sampler that knows nothing of timesteps."""
    rng = np.random.default_rng(seed)
    values = {name: drawn(rng, distribution) for name, distribution in space.distributions().items()}
    for name in list(values)[1::2]:  # repeats and the ends of the range
        if name.startswith("t_"):
            values[name] = int(rng.choice([values["t_00"], 0, space.T - 1]))
    return values


@settings(max_examples=300, deadline=None)
@given(NAMES, SEEDS)
def test_decode_makes_any_values_canonical_and_is_idempotent(name: str, seed: int) -> None:
    space = SPACES[name]
    candidate = space.decode(garbage(space, seed))
    assert space.is_canonical(candidate)
    assert space.decode(space.encode(candidate)) == candidate


@settings(max_examples=300, deadline=None)
@given(NAMES, SEEDS)
def test_encode_and_decode_are_inverse(name: str, seed: int) -> None:
    space = SPACES[name]
    candidate = random_candidate(np.random.default_rng(seed), space, space.max_skip)
    params = space.encode(candidate)
    assert space.decode(params) == candidate
    ranges = space.distributions()
    assert set(params) <= set(ranges)
    optuna.create_trial(params=params, distributions={n: ranges[n] for n in params}, value=0.0)  # raises out of range
    assert all(type(v) is (int if isinstance(ranges[n], IntDistribution) else type(v)) for n, v in params.items())


@settings(max_examples=200, deadline=None)
@given(NAMES, SEEDS, st.randoms(use_true_random=False))
def test_order_of_the_steps_does_not_matter(name: str, seed: int, random: Any) -> None:
    space = SPACES[name]
    candidate = random_candidate(np.random.default_rng(seed), space, space.max_skip)
    pairs = list(candidate.pairs)
    random.shuffle(pairs)
    assert space.repair(pairs, candidate.settings) == candidate


def test_parameters_are_static_and_short() -> None:
    space = SPACES["skips"]
    names = space.distributions()
    assert "steps" not in names
    assert names["t_05"] == IntDistribution(0, 999)
    assert names["modes_05_0"] == IntDistribution(0, 2**32 - 1)
    assert names["modes_05_1"] == IntDistribution(0, 2**8 - 1)
    assert SPACES["range"].distributions()["steps"] == IntDistribution(3, 8)
    assert len(SPACES["no costs"].distributions()) == 3 * (1 + 5)
    assert list(SearchSpace(1000, 4, 4, units=units(5)).distributions()) == ["t_00", "t_01", "t_02", "t_03"]


def test_encode_names_only_its_own_steps() -> None:
    assert SPACES["range"].encode(Candidate((90, 50, 10))) == {"steps": 3, "t_00": 90, "t_01": 50, "t_02": 10}


def test_decode_ignores_later_steps_and_needs_its_own() -> None:
    params = {"steps": 3, "t_00": 90, "t_01": 50, "t_02": 10, "t_03": 999}
    assert SPACES["range"].decode(params).timesteps == (90, 50, 10)
    with pytest.raises(ConfigError, match="t_04"):
        SPACES["range"].decode({**params, "steps": 5})


def test_out_of_range_values_are_brought_in() -> None:
    raw = {"t_00": 5000, "t_01": 999, "t_02": -3, "t_03": 0}
    assert SPACES["fixed"].decode(raw).timesteps == (999, 998, 1, 0)


def test_skips_follow_their_timestep_through_decode() -> None:
    params = {
        "t_00": 10,
        "t_01": 700,
        "t_02": 300,
        **{f"modes_0{k}_{u}": 0 for k in range(3) for u in range(5)},
    }
    params |= {"modes_00_1": 1, "modes_02_4": 1}
    assert SPACES["no costs"].decode(params) == Candidate((700, 300, 10), (0, skips(16), skips(2)))


def test_cost_counts_every_visit() -> None:
    space = SPACES["heun"]
    assert heun_visits(3, {}) == (0, 1, 1, 2, 2)
    modes = (skips(1 << 2), 0, skips(1 << 1))
    assert space.cost(Candidate((900, 500, 100), modes)) == pytest.approx(5 - COSTS[2] - 2 * COSTS[1])


def test_budget_and_stages() -> None:
    assert (SPACES["budget"].stage_one_possible, SPACES["budget"].full_steps) == (True, 6)
    assert (SPACES["only with skips"].stage_one_possible, SPACES["only with skips"].full_steps) == (False, 6)
    assert SPACES["only with skips"].open_limit(0.0) == 8
    assert SPACES["skips"].open_limit(0.0) == 0
    assert SPACES["heun"].full_steps == 4
    assert SearchSpace(1000, 4, 4, units=units(100), max_skip=0.29).skip_limit(0.29) == 29


def test_over_budget_drops_the_crowded_step_then_skips_the_costliest() -> None:
    space = SearchSpace(1000, 3, 5, units=units(3), unit_costs=(0.1, 0.3, 0.2), max_skip=0.7, max_cost=3.5)
    crowded = Candidate((900, 600, 590, 100))
    assert space.fit(crowded, 0.7).timesteps == (900, 600, 100)
    tight = SearchSpace(1000, 3, 3, units=units(3), unit_costs=(0.1, 0.3, 0.2), max_skip=0.7, max_cost=2.3)
    fitted = tight.fit(Candidate((900, 600, 100)), 0.7)
    assert fitted.modes == (skips(0b010),) * 3
    assert tight.cost(fitted) == pytest.approx(2.1)


def test_cheap_skips_give_way_to_costly_ones() -> None:
    space = SearchSpace(1000, 2, 2, units=units(3), unit_costs=(0.0, 0.1, 0.5), max_skip=0.34, max_cost=1.0)
    assert space.fit(Candidate((9, 1), (skips(0b001), skips(0b010))), 0.34).modes == (skips(0b100),) * 2


def test_long_skip_sets_are_cut_without_favourites() -> None:
    space = SearchSpace(1000, 1, 1, units=units(10), max_skip=0.2)
    kept = [space.fit(Candidate((5,), (skips(mask),)), 0.2).modes[0] for mask in range(2**10)]
    assert all(k & ~skips(mask) == 0 and k.bit_count() == min(2, mask.bit_count()) for mask, k in enumerate(kept))
    times_kept = [sum(k >> 2 * u & 1 for k in kept) for u in range(10)]
    assert min(times_kept) > 0.6 * max(times_kept)


def test_is_canonical_sees_each_fault() -> None:
    space = SPACES["budget"]
    good = Candidate((900, 700, 500, 300))
    assert space.is_canonical(good)
    for bad in (
        Candidate((900, 700, 500)),
        Candidate((1000, 700, 500, 300)),
        Candidate((900, 899, 500, 300)),
        Candidate(good.timesteps, (skips(2**9 - 1), 0, 0, 0)),
        Candidate(good.timesteps, (skips(1 << 40), 0, 0, 0)),
        Candidate(good.timesteps, (0, REUSE, 0, 0)),
        Candidate(tuple(range(900, 200, -100))),
    ):
        assert not space.is_canonical(bad), bad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_steps": 0}, "at least 1"),
        ({"min_gap": 0}, "at least 1"),
        ({"min_steps": 5}, "larger than max_steps"),
        ({"max_steps": 6, "min_gap": 200}, "allowed: up to 5"),
        ({"max_skip": 1.5}, "between 0 and 1"),
        ({"chunk": 33}, "between 1 and 32"),
        ({"units": ("a", "b"), "unit_costs": (0.1,)}, "2 units but 1 unit_costs"),
        ({"units": ("a", "b"), "unit_costs": (0.7, 0.7)}, "sum at most 1"),
        ({"units": ("a", "b"), "max_skip": 0.4}, "at least 0.5"),
        ({"max_cost": 3.0}, r"max_cost 3 cannot be met: the cheapest candidate costs 4 "),
        ({"units": ("a",), "unit_costs": (0.2,), "max_skip": 1.0, "max_cost": 3.0}, "costs 3.2 "),
        ({"choices": {"solver": ("heun",)}}, r"solver = \['heun'\] is searched, so it needs two or more"),
        ({"choices": {"solver": ("heun", "heun")}}, "each once"),
        ({"choices": {"solver": ("heun", "4.5")}}, "look like a number"),
        ({"choices": {"solver": ("heun", "a=b")}}, "hold any of"),
        ({"choices": {"steps": ("few", "many")}}, "cannot be called 'steps'"),
        ({"ranges": {"t_00": (0, 1)}}, "cannot be called 't_00'"),
        ({"ranges": {"guidance": (4.0, 4.0)}}, "from a lower to a higher"),
        ({"ranges": {"guidance": (float("nan"), 4.0)}}, "finite"),
        ({"ranges": {"guidance": (0.0005, 4.0)}}, "at most 3 decimals"),
        ({"choices": {"eta": ("a", "b")}, "ranges": {"eta": (0, 1)}}, "both a choice and a range"),
        (
            {"choices": {"solver": ("ddim", "heun")}, "visits": solver_visits, "max_cost": 4.0},
            "solver=heun cannot meet max_cost 4: its cheapest candidate costs 7 ",
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SearchSpace(**{"T": 1000, "min_steps": 4, "max_steps": 4, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SPACES)
def test_suggest_works_with_foreign_samplers(name: str) -> None:
    space = SPACES[name]
    for sampler in (
        optuna.samplers.RandomSampler(seed=0),
        optuna.samplers.TPESampler(seed=0, n_startup_trials=2),
    ):
        study = optuna.create_study(sampler=sampler)
        for _ in range(4):
            trial = study.ask()
            candidate = space.suggest(trial)
            study.tell(trial, float(candidate.timesteps[0]))
            assert space.is_canonical(candidate)
            assert space.decode(trial.params) == candidate


def test_codec_names_what_must_not_change() -> None:
    assert SPACES["range"].codec() == {
        "codec": 2, "T": 1000, "steps": [3, 8], "min_gap": 5, "units": [], "modes": ["skip"], "chunk": 32,
        "choices": {}, "ranges": {},
    }  # fmt: skip


def test_codec_names_settings_where_there_are_any() -> None:
    codec = SPACES["settings"].codec()
    assert codec["choices"] == {"final": ["zero", "sigma_min"], "solver": ["ddim", "heun", "dpmpp"]}
    assert codec["ranges"] == {"eta": [0.0, 0.05], "guidance": [1.0, 8.0]}


def test_settings_are_parameters_under_their_own_names() -> None:
    space = SPACES["all open"]
    parameters = space.distributions()
    assert parameters["solver"] == CategoricalDistribution(("ddim", "heun", "dpmpp"))
    assert parameters["guidance"] == FloatDistribution(-1.5, 7.25)
    candidate = space.fit(Candidate((900, 500, 100), settings=(("solver", "heun"),)), 0.3)
    assert space.encode(candidate)["solver"] == "heun"
    assert candidate.settings_dict == {"final": "zero", "guidance": 2.875, "solver": "heun"}


def test_defaults_are_the_first_choices_and_the_middles() -> None:
    space = SPACES["settings"]
    assert list(space.default_settings.items()) == [
        ("eta", 0.025), ("final", "zero"), ("guidance", 4.5), ("solver", "ddim"),
    ]  # fmt: skip
    assert SPACES["one setting"].default_settings == {"order": 1.0}
    assert SPACES["fixed"].default_settings == {}


def test_fit_completes_settings_and_drops_unknown_ones() -> None:
    space = SPACES["settings"]
    odd = Candidate.from_pairs(
        [(9, 0), (8, 0), (7, 0), (6, 0)],
        {"guidance": 99.0, "eta": 0.0123456, "solver": "unheard of", "tune": "jazz"}.items(),
    )
    assert not space.is_canonical(odd)
    fitted = space.fit(odd, 0)
    assert fitted.settings_dict == {"eta": 0.012, "final": "zero", "guidance": 8.0, "solver": "ddim"}
    assert space.is_canonical(fitted)
    assert space.fit(fitted, 0) == fitted
    assert SPACES["fixed"].fit(odd, 0).settings == ()


def test_decode_refuses_missing_and_unknown_settings() -> None:
    space = SPACES["one setting"]
    with pytest.raises(ConfigError, match="'order' is missing"):
        space.decode({"t_00": 9, "t_01": 5})
    with pytest.raises(ConfigError, match=r"'order' is 3; allowed here: 1.0, 2.0"):
        space.decode({"t_00": 9, "t_01": 5, "order": 3})


def test_cost_depends_on_the_settings() -> None:
    space = SPACES["solvers"]
    times = (900, 700, 500, 300, 100)
    costs = {s: space.cost(Candidate(times, settings=(("solver", s),))) for s in ("ddim", "heun", "dpmpp")}
    assert costs == {"ddim": 5, "heun": 9, "dpmpp": 5}
    assert space.cost(Candidate(times)) == 5  # the default solver's
    assert (space.full_steps, space.full_steps_with({"solver": "heun"})) == (8, 4)


def test_over_budget_drops_steps_or_skips_before_the_solver_changes() -> None:
    dropped = SPACES["solvers"].fit(Candidate((900, 700, 500, 300, 100), settings=(("solver", "heun"),)), 0)
    assert (dropped.steps, dropped.settings) == (4, (("solver", "heun"),))
    space = SPACES["heun with skips"]
    costly = Candidate((900, 700, 500, 300), settings=(("guidance", 3.0), ("solver", "heun")))
    assert (space.stage_one_possible, space.open_limit(0.0)) == (True, 0)
    skipping = space.fit(costly, 0.2)
    assert skipping.settings == costly.settings
    assert any(skipping.modes)
    for rng in (None, np.random.default_rng(0)):
        changed = space.fit(costly, 0.0, rng)  # nothing may be skipped in stage one
        assert changed == Candidate(costly.timesteps, settings=(("guidance", 3.0), ("solver", "ddim")))


def test_as_few_settings_change_as_will_do() -> None:
    def visits(steps: int, settings: Any) -> range:
        return range(steps * (1 + (settings["a"] == "dear") + (settings["b"] == "dear")))

    space = SearchSpace(
        1000, 2, 2, max_cost=4, visits=visits,
        choices={"a": ("dear", "cheap"), "b": ("dear", "cheap"), "c": ("x", "y")}, ranges={"g": (0, 1)},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    settings = (("a", "dear"), ("b", "dear"), ("c", "y"), ("g", 0.25))
    found = {space.fit(Candidate((9, 1), settings=settings), 0, rng).settings for _ in range(50)}
    assert found == {
        (("a", "cheap"), ("b", "dear"), ("c", "y"), ("g", 0.25)),
        (("a", "dear"), ("b", "cheap"), ("c", "y"), ("g", 0.25)),
    }


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_infinity=True), st.integers(-2000, 2000), st.integers(1, 3000))
def test_numbers_are_rounded_within_their_range(value: float, low: int, width: int) -> None:
    space = SearchSpace(1000, 1, 1, ranges={"guidance": (low / 1000, (low + width) / 1000)})
    once = space.canonical_settings({"guidance": value})
    number = once["guidance"]
    assert isinstance(number, float)
    assert low / 1000 <= number <= (low + width) / 1000
    assert repr(number) == repr(round(number, 3) + 0.0)
    assert space.canonical_settings(once) == once
    if low / 1000 <= value <= (low + width) / 1000:
        assert abs(number - value) <= 0.0005 + 1e-12


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_a_database(name: str, tmp_path: Path) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    candidates = [random_candidate(rng, space, space.max_skip) for _ in range(5)]
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=url)
    for candidate in candidates:
        study.enqueue_trial(space.encode(candidate))
        trial = study.ask()
        assert space.suggest(trial) == candidate
        study.tell(trial, 1.0)
    stored = optuna.load_study(study_name="s", storage=url)
    assert [space.decode(trial.params) for trial in stored.trials] == candidates
    assert [space.encode(c) for c in candidates] == [trial.params for trial in stored.trials]


def test_equal_spaces_are_equal_and_hash_alike() -> None:
    def space(solvers: tuple[str, ...]) -> SearchSpace:
        return SearchSpace(1000, 4, 4, choices={"solver": solvers}, ranges={"eta": (0, 1)})

    assert space(("a", "b")) == space(("a", "b")) != space(("b", "a"))
    assert hash(space(("a", "b"))) == hash(space(("a", "b")))
    assert pickle.loads(pickle.dumps(space(("a", "b")))) == space(("a", "b"))
