"""The ablation: each candidate is valid and differs from the winner in one thing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from search_spaces import SPACES

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.results.ablation import ablation_of, default_settings, undo_each
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.search.operators import random_candidate
from autodiffusion_optuna.search.repair import spread
from autodiffusion_optuna.search.timesteps import uniform_timesteps
from autodiffusion_optuna.storage.attrs import held_out_key


@pytest.mark.parametrize("name", SPACES)
def test_every_change_is_undone_alone_and_leaves_a_valid_candidate(name: str) -> None:
    space = SPACES[name]
    for seed in range(40):
        best = random_candidate(np.random.default_rng(seed), space, space.max_skip)
        uniform = spread(uniform_timesteps(space.T, best.steps), space.T, space.min_gap)
        undone = undo_each(best, space.codec())
        assert len({change.name for change in undone}) == len(undone)
        for change in undone:
            other = change.candidate
            assert (
                sum(a != b for a, b in zip(best.timesteps, other.timesteps, strict=True))
                + sum(a != b for a, b in zip(best.modes, other.modes, strict=True))
                + sum(a != b for a, b in zip(best.settings, other.settings, strict=True))
                == 1
            )
            assert 0 <= other.timesteps[-1] <= other.timesteps[0] < space.T
            assert all(a - b >= space.min_gap for a, b in pairwise(other.timesteps))
            for found, place, target in zip(best.timesteps, other.timesteps, uniform, strict=True):
                assert abs(place - target) <= abs(found - target)  # never away from its uniform place
            assert other.settings_dict.keys() == best.settings_dict.keys()


def test_what_is_as_uniform_and_the_defaults_has_nothing_to_undo() -> None:
    space = SPACES["settings"]
    settings = tuple(default_settings(space.codec()).items())
    assert dict(settings) == space.default_settings
    uniform = Candidate(uniform_timesteps(space.T, 4), settings=tuple(sorted(settings)))
    assert undo_each(uniform, space.codec()) == []


def test_a_neighbour_in_the_way_is_said() -> None:
    space = SPACES["fixed"]
    undone = {
        change.name: change.candidate.timesteps for change in undo_each(Candidate((990, 800, 790, 0)), space.codec())
    }
    assert undone == {
        "step 3: timestep 790 back to 250": (990, 800, 250, 0),
        "step 2: timestep 800 back to 791, as near to 500 as its neighbours allow": (990, 791, 790, 0),
        "step 1: timestep 990 back to 801, as near to 750 as its neighbours allow": (801, 800, 790, 0),
    }
    assert next(iter(undone)).startswith("step 3")  # those that share most with the winner come first


def test_an_ablation_stays_when_the_winner_is_scored_on_more_images() -> None:
    space, best = SPACES["fixed"], Candidate((990, 800, 790, 0))
    first, second, third = (change.candidate for change in undo_each(best, space.codec()))

    def stored(candidate: Candidate, images: int, *values: float) -> dict[str, object]:
        held_out = HeldOut(images, values)
        return {held_out_key(candidate.key, images, len(values)): held_out.to_json()}

    attrs = stored(best, 64, 1.0, 2.0, 3.0)
    for number, candidate in enumerate((first, second, third), 1):
        attrs |= stored(candidate, 64, 1.0 + number, 2.0 + number)
    attrs |= stored(best, 1000, 0.5, 0.5) | stored(third, 1000, 7.0, 7.0)  # begun on more images, and stopped
    changes = ablation_of(attrs, best, None, space.codec())
    assert [(change.held_out.size, change.difference.mean) for change in changes] == [((64, 2), n) for n in (3, 2, 1)]
    assert [change.candidate for change in ablation_of(attrs, best, (1000, 2), space.codec())] == [third]
    assert ablation_of(attrs, best, (1000, 5), space.codec()) == []
