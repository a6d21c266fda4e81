"""From what a search tried to what its winner was worth after how many evaluations."""

from __future__ import annotations

import math

import pytest
import rivals
from rival_curves import (
    changes,
    first_no_worse,
    held_out_curve,
    median,
    median_curve,
    ratio_at,
    reached,
    stays_no_worse,
    thinned,
)
from rival_live import Live

CURVE = [(10, 9.0), (20, 7.0), (30, 8.0), (40, 6.0)]
LIVE = Live("digits-4", "digits-4", images=250, held_out=100, seeds=3, ea_seeds=1)


def test_candidates_until_the_best_is_close_enough() -> None:
    assert reached([1.5, 1.02, 1.0], 1.02) == 2
    assert reached([1.5, 1.3], 1.02) is None
    assert [ratio_at([3.0, 2.0], n) for n in (1, 2, 9)] == [3.0, 2.0, 2.0]


def test_a_seed_that_never_gets_there_counts_as_last() -> None:
    assert median([5, None, 3]) == 5
    assert median([None, None, 3]) is None
    assert median([None, 4]) is None


def test_winners_are_the_first_moments_of_each_and_the_end() -> None:
    spent = [(1, "a"), (2, "a"), (3, "b"), (4, "b")]
    assert changes(spent) == [(1, "a"), (3, "b"), (4, "b")]
    assert changes([*spent, (4, "c")]) == [(1, "a"), (3, "b"), (4, "c")]  # chosen at the end, on other noise


def test_thinned_winners_stood_when_the_evaluations_had_doubled() -> None:
    winners = [(1, "a"), (10, "b"), (11, "c"), (100, "d"), (101, "e")]
    assert thinned(winners, 2.0) == [(1, "a"), (11, "c"), (101, "e")]  # at 1 to 8, at 16 to 64, at the end
    assert thinned([(1, "a")], 2.0) == [(1, "a")]
    assert thinned([(1, "a"), (9, "a")], 2.0) == [(1, "a"), (9, "a")]


def test_a_winners_worth_is_its_mean_over_the_banks() -> None:
    assert held_out_curve([(5, "a"), (9, "b")], {"a": [1.0, 3.0], "b": [1.0, 1.0]}) == [(5, 2.0), (9, 1.0)]


@pytest.mark.parametrize(
    ("target", "first", "for_good"), [(9.5, 10, 10), (7.5, 20, 40), (7.0, 20, 40), (6.0, 40, 40), (5.0, None, None)]
)
def test_evaluations_until_a_winner_is_no_worse(target: float, first: int | None, for_good: int | None) -> None:
    assert first_no_worse(CURVE, target) == first
    assert stays_no_worse(CURVE, target) == for_good


def test_the_median_curve_begins_where_all_seeds_have_a_winner() -> None:
    found = median_curve([[(1, 9.0), (5, 1.0)], [(2, 5.0)], [(3, 7.0)]])
    assert found == [(3, 7.0), (5, 5.0)]


def run(curve: list[tuple[int, float]], seconds: float = 1.0) -> dict[str, object]:
    """A finished run whose winners are called by their values."""
    winners = [(spent, str(value)) for spent, value in curve]
    values = {key: [float(key) - 1, float(key) + 1] for _, key in winners}
    said = {"precision": "float32", "device": "cpu", "processor": "one", "metric": "FD"}
    return {"winners": winners, "held_out": values, "seconds": seconds, **said}


def test_evaluations_to_papers_final_are_the_median_over_seeds() -> None:
    ours = {0: run([(10, 9.0), (20, 5.0)]), 1: run([(10, 6.0), (25, 8.0)]), 2: run([(10, 9.0), (40, 5.5)])}
    published = {0: run([(100, 9.0), (1000, 6.0)])}
    result = {section: {} for section in rivals.SECTIONS}
    rivals.add_live(result, LIVE, {"adopt": ours, "published EA": published})
    adopt = result["live"]["digits-4"]["adopt"]
    assert adopt["evaluations to paper's final"] == 20  # of 20, 10 and 40
    assert adopt["held-out median"] == 5.5
    assert adopt["held-out interval"] == [5.0, 8.0]
    assert adopt["evaluations"] == 25
    assert adopt["seeds"] == 3
    ratios = result["ratios"]["digits-4"]
    assert ratios["per cent of it"] == 2.0
    assert ratios["per cent of it at 5,000 images"] == pytest.approx(0.1)  # twenty times the images
    assert ratios["evaluations from which ours stays no worse"] == 40  # of 20, never and 40
    assert result["finished"]["digits-4"] == {"adopt": "3 of 3 seeds", "published EA": "1 of 1 seeds"}


def test_a_search_that_is_never_as_good_says_so() -> None:
    result = {section: {} for section in rivals.SECTIONS}
    rivals.add_live(result, LIVE, {"adopt": {0: run([(10, 9.0)])}, "published EA": {0: run([(9, 6.0)])}})
    assert result["live"]["digits-4"]["adopt"]["evaluations to paper's final"] is None
    assert result["ratios"]["digits-4"]["per cent of it"] is None


def test_lists_cost_what_computing_them_took() -> None:
    lists = {"lists": {"uniform": "3,2", "oss": "4,2"}, "evaluations": {"uniform": 0, "oss": 700}}
    entry = rivals.listed(LIVE, {**lists, "held_out": {"3,2": [1.0, 3.0], "4,2": [1.0, 1.5]}})
    assert entry["oss"]["evaluations"] == 700
    assert entry["uniform"]["held-out median"] == 2.0
    low, high = entry["uniform"]["held-out interval"]
    assert low < 1 < 3 < high


def test_what_was_run_elsewhere_stays_in_the_result() -> None:
    old = {"live": {"digits-4": {"adopt": 1, "TPE": 2}, "faces-4": {"adopt": 3}}}
    new = {section: {} for section in rivals.SECTIONS} | {"live": {"digits-4": {"adopt": 4}}}
    found = rivals.merged(old, new)
    assert found["live"] == {"digits-4": {"adopt": 4, "TPE": 2}, "faces-4": {"adopt": 3}}
    assert found["tables"] == {}
    assert math.isfinite(len(found))


def test_runs_come_in_rounds_and_can_be_chosen() -> None:
    def chosen(*words: str) -> list[tuple[str, str, int]]:
        return [task[:3] for task in rivals.tasks(rivals.parsed(words))]

    live = chosen("--problems", "digits-4", "faces-4", "--methods", "adopt", "published EA", "random")
    assert live[:8] == [("digits-4", "adopt", s) for s in range(5)] + [("faces-4", "adopt", s) for s in range(3)]
    assert [seed for _, _, seed in live[8:]] == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2 + [4] * 2  # faces: 3, EA 2
    assert chosen("--problems", "faces-6", "--methods", "published EA", "--seeds", "1") == [
        ("faces-6", "published EA", 1)
    ]
    with pytest.raises(SystemExit):
        chosen("--again")
