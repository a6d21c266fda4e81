from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodiffusion_optuna.candidate import REUSE, SKIP, Candidate, grounded, packed, unit_modes

modes = st.dictionaries(st.integers(0, 40), st.sampled_from([SKIP, REUSE])).map(
    lambda chosen: sum(mode << 2 * unit for unit, mode in chosen.items())
)
pairs = st.dictionaries(st.integers(0, 999), modes, min_size=1, max_size=12)
candidates = pairs.map(lambda chosen: Candidate.from_pairs(chosen.items()))


def allowed(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not set(text) & set("=;|,")
    return False


TEXT = "aefinINt09_.+-: é\n"
names = st.text(TEXT, min_size=1, max_size=8)
values = st.text(TEXT + "=;|,", min_size=1, max_size=8).filter(allowed) | st.floats(
    allow_nan=False, allow_infinity=False
)
with_settings = st.tuples(pairs, st.dictionaries(names, values, max_size=4)).map(
    lambda chosen: Candidate.from_pairs(chosen[0].items(), chosen[1].items())
)


@given(candidates | with_settings)
def test_key_and_json_are_inverse(candidate: Candidate) -> None:
    assert Candidate.from_key(candidate.key) == candidate
    assert Candidate.from_json(candidate.to_json()) == candidate
    assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))).key == candidate.key


@given(candidates | with_settings, candidates | with_settings)
def test_equal_keys_mean_equal_candidates(one: Candidate, other: Candidate) -> None:
    assert (one.key == other.key) == (one == other)


def test_modes_travel_with_their_timestep() -> None:
    assert Candidate.from_pairs([(3, 21), (900, 1), (40, 0)]) == Candidate((900, 40, 3), (1, 0, 21))


def test_names_of_units_by_mode() -> None:
    candidate = Candidate((9, 2), (packed(skips=[0, 2]), packed(skips=[1], reuses=[0])))
    assert candidate.unit_names(["a", "b", "c"], SKIP) == [["a", "c"], ["b"]]
    assert candidate.unit_names(["a", "b", "c"], REUSE) == [[], ["a"]]
    assert unit_modes(packed(skips=[5, 1], reuses=[70])) == {1: SKIP, 5: SKIP, 70: REUSE}


def test_a_unit_is_not_skipped_and_reused_at_once() -> None:
    with pytest.raises(ValueError, match="skipped or reused at a step, not both"):
        Candidate((9, 2), (0, 0b1100))


def test_what_has_not_run_is_not_reused() -> None:
    skip, reuse = packed(skips=[0]), packed(reuses=[0])
    assert grounded([reuse, reuse, skip, reuse]) == (0, reuse, skip, reuse)
    assert grounded([skip, reuse, reuse]) == (skip, 0, reuse)
    assert grounded([0, reuse, reuse], [0, 1, 1]) == (0, 0, reuse)  # the first step is never evaluated
    assert grounded([packed(reuses=[1]), packed([1], [0])]) == (0, packed([1], [0]))


@pytest.mark.parametrize("timesteps", [(), (1, 1), (1, 2), (3, -1)])
def test_timesteps_that_are_not_strictly_descending_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        Candidate(timesteps)


def test_modes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 timesteps but modes of 1 steps"):
        Candidate((2, 1), (0,))


def test_keys_with_and_without_settings() -> None:
    plain = Candidate((940, 613), (0x14, 0))
    assert (plain.key, list(plain.to_json())) == ("940:14,613", ["timesteps", "skips", "reuses"])
    named = Candidate.from_pairs(plain.pairs, [("solver", "deis_3"), ("guidance", 4.5), ("final", "zero")])
    assert named.key == "final=zero;guidance=4.5;solver=deis_3|940:14,613"
    assert named.to_json()["settings"] == {"final": "zero", "guidance": 4.5, "solver": "deis_3"}
    assert named != plain
    assert hash(named) == hash(Candidate.from_key(named.key))


def test_settings_are_read_from_a_key() -> None:
    assert Candidate.from_key("guidance=4;solver=heun|9").settings_dict == {"guidance": 4.0, "solver": "heun"}


@pytest.mark.parametrize("value", [4, np.float64(4.0), np.int64(4).item()])
def test_equal_numbers_have_equal_keys(value: Any) -> None:
    assert Candidate((9,), settings=(("eta", value),)).key == "eta=4.0|9"
    assert Candidate((9,), settings=(("eta", -0.0),)).key == "eta=0.0|9"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((("b", "x"), ("a", "y")), "ascending by name"),
        ((("a", "x"), ("a", "y")), "each name once"),
        ((("", "x"),), "name must not be empty"),
        ((("a=b", "x"),), "name must not be empty or hold"),
        ((("a", ""),), "must not be empty"),
        ((("a", "x;y"),), "hold any of"),
        ((("a", "x|y"),), "hold any of"),
        ((("a", "x,y"),), "hold any of"),
        ((("a", "x=y"),), "hold any of"),
        ((("a", "1e3"),), "look like a number"),
        ((("a", "nan"),), "look like a number"),
        ((("a", float("inf")),), "finite number"),
        ((("a", True),), "finite number"),
        ((("a", None),), "finite number"),
    ],
)
def test_settings_that_no_key_can_hold_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidate((9,), settings=settings)


@pytest.mark.parametrize("key", ["|9", "solver|9", "solver=|9", "b=x;a=y|9", "a=x;a=y|9", "a=inf|9", "a=x|", "a=b=c|9"])
def test_keys_that_name_no_settings_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"setting|literal"):
        Candidate.from_key(key)
