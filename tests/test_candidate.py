from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodiffusion_optuna.candidate import Candidate, skip_set, unit_indices

candidates = st.dictionaries(st.integers(0, 999), st.integers(0, 2**60), min_size=1, max_size=12).map(
    lambda pairs: Candidate.from_pairs(pairs.items())
)


@given(candidates)
def test_key_and_json_are_inverse(candidate: Candidate) -> None:
    assert Candidate.from_key(candidate.key) == candidate
    assert Candidate.from_json(candidate.to_json()) == candidate


@given(candidates, candidates)
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
