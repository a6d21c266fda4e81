"""The race over a search that it did not touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import race
from race import Looked, replay, summary

from autodiffusion_optuna import noise


def searched(ends: list[float], *, screen: list[float] | None = None) -> list[Looked]:
    """Candidates that end so, and of which a screen of eight images and 64 images tell as much."""
    told = ends if screen is None else screen
    return [
        Looked(f"{n}", [value + 0.01 * i for i in range(8)], {8: value, 64: value, 128: end}, end)
        for n, (value, end) in enumerate(zip(told, ends, strict=True))
    ]


GOOD = [5.0, 6.0, 5.5, 5.2, 5.8, 5.1, 5.6, 5.3]


def test_what_is_far_worse_stops_at_the_screen_and_the_first_do_not() -> None:
    stopped = replay(searched([50.0, *GOOD, 50.0, 4.9, 60.0]), [8, 64])
    assert stopped[:3] == [None] * 3
    assert (stopped[9], stopped[10], stopped[11]) == (8, None, 8)


def test_a_screen_that_says_nothing_stops_nobody() -> None:
    rng = np.random.default_rng(0)
    candidates = searched([*rng.uniform(5, 6, 12), 50.0], screen=[*rng.uniform(5, 6, 12), 50.0])
    assert replay(candidates, [8])[:12] == [None] * 12


def test_the_summary_counts_the_best_that_were_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "BEST", 3)
    misjudged = searched([*GOOD, 50.0, 4.0], screen=[*GOOD, 50.0, 50.0])  # the best looks as bad as the worst
    told = summary(misjudged, 128, 20)
    assert told["best stopped"] == 1
    assert told["stopped"] == {"8": 2, "64": 0}
    assert told["evaluations"] == pytest.approx(100 * (20 + 8 * 128 + 2 * 8) / (10 * 128), abs=0.1)


def test_a_search_in_full_has_every_value_of_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "RUNGS", (16, 24))
    found, images, teacher = race.search_in_full(
        "digits-4", tmp_path, 3, "score.images=32", "search.warm_starts=['uniform']"
    )
    assert (images, teacher) == (32, 16 * 8)
    assert [sorted(c.values) for c in found] == [[8, 16, 24, 32]] * 3
    assert all(len(c.by_image) == 8 and c.last == c.values[32] for c in found)


def test_a_second_order_teacher_of_few_steps_ranks_as_many_steps_do() -> None:
    found = race.teachers(noise.linear())
    assert found["dpmpp_2m, log-snr, 40 steps"]["dpmpp_2m, 20 steps"] > 0.95
    assert found["ddim, uniform-linspace, 25 steps"]["dpmpp_2m, 20 steps"] < 0.5
