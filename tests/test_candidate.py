from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodiffusion_optuna.candidate import Candidate, skip_set, unit_indices

pairs = st.dictionaries(st.integers(0, 999), st.integers(0, 2**60), min_size=1, max_size=12)
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


def test_a_skip_set_travels_with_its_timestep() -> None:
    assert Candidate.from_pairs([(3, 7), (900, 1), (40, 0)]) == Candidate((900, 40, 3), (1, 0, 7))


def test_names_of_skipped_units() -> None:
    assert Candidate((9, 2), (0b101, 0)).skip_names(["a", "b", "c"]) == [["a", "c"], []]
    assert unit_indices(skip_set([5, 1])) == [1, 5]


@pytest.mark.parametrize("timesteps", [(), (1, 1), (1, 2), (3, -1)])
def test_timesteps_that_are_not_strictly_descending_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        Candidate(timesteps)


def test_skips_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 timesteps but 1 skip sets"):
        Candidate((2, 1), (0,))


def test_keys_with_and_without_settings() -> None:
    plain = Candidate((940, 613), (0x1A, 0))
    assert (plain.key, list(plain.to_json())) == ("940:1a,613", ["timesteps", "skips"])
    named = Candidate.from_pairs(plain.pairs, [("solver", "deis_3"), ("guidance", 4.5), ("final", "zero")])
    assert named.key == "final=zero;guidance=4.5;solver=deis_3|940:1a,613"
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
