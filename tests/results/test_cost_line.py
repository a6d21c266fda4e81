"""What a search costs at most: the arithmetic, and how it is said."""

from __future__ import annotations

import pytest

from autodiffusion_optuna.results.cost import BOOKKEEPING, Pace, Work, cost_line, duration

PACE = Pace(batch=64, evaluation=0.5, rest=0.25, distance=0.1, device="the CPU")
WORK = Work(evaluations=6, paid=6, images=256, candidates=120, held_out=3, held_out_images=3000)


def test_seconds_are_those_of_whole_batches() -> None:
    assert PACE.seconds(6, 256) == pytest.approx(4 * (6 * 0.5 + 0.25) + 0.1)
    assert PACE.seconds(6, 257) == pytest.approx(5 * (6 * 0.5 + 0.25) + 0.1)
    assert PACE.seconds(6, 1) == pytest.approx(6 * 0.5 + 0.25 + 0.1)


def test_a_search_is_its_candidates_shared_by_workers() -> None:
    each = PACE.seconds(6, 256) + BOOKKEEPING
    assert WORK.network_evaluations == 6 * 256 * 120
    assert WORK.search_seconds(PACE) == pytest.approx(120 * each)
    assert WORK.search_seconds(PACE, 7) == pytest.approx(18 * each)  # the last of them runs alone
    assert WORK.held_out_seconds(PACE) == pytest.approx(3 * PACE.seconds(6, 3000))


def test_every_bank_has_its_distance_and_the_floor_counts_where_it_is_scored() -> None:
    banks = Work(6, 6, 2560, 120, 3, 1000, held_out_banks=5, floor=100)
    floor = 5 * PACE.seconds(100, 1000)
    assert floor < 120 * PACE.seconds(6, 2560)
    assert banks.held_out_seconds(PACE) == pytest.approx(15 * PACE.seconds(6, 1000) + floor)
    short = Work(6, 6, 2560, 2, 3, 1000, held_out_banks=5, floor=100)  # the floor would take longer than the search
    assert short.held_out_seconds(PACE) == pytest.approx(15 * PACE.seconds(6, 1000))
    going_on = Work(6, 6, 2560, 2, 3, 1000, held_out_banks=5, floor=100, finished=118)
    assert going_on.held_out_seconds(PACE) == pytest.approx(banks.held_out_seconds(PACE))


def test_skipped_layers_must_save_what_the_budget_does_not_pay() -> None:
    cheap = Work(6, 4.5, 256, 120, 3, 3000)
    assert cheap.network_evaluations == WORK.network_evaluations
    assert cheap.search_seconds(PACE) == pytest.approx(120 * (PACE.seconds(4.5, 256) + BOOKKEEPING))


def test_the_line() -> None:
    line = cost_line(WORK, PACE)
    assert line.startswith("cost: 6 evaluations x 256 images x 120 candidates = 184,320 network evaluations, at most ")
    assert "at most 26 minutes on the CPU (13 seconds a candidate" in line
    assert line.endswith("then 7.6 minutes of held-out scores")
    assert "at most 6.6 minutes by 4 workers on the CPU" in cost_line(WORK, PACE, 4)
    assert "1 evaluation x 1 image x 1 candidate = 1 network evaluations" in cost_line(Work(1, 1, 1, 1, 2, 4), PACE)


def test_starts_that_are_to_be_computed_are_part_of_it() -> None:
    with_starts = Work(6, 6, 256, 120, 3, 3000, starts=1920)
    assert with_starts.network_evaluations == WORK.network_evaluations + 1920
    assert with_starts.search_seconds(PACE) == pytest.approx(WORK.search_seconds(PACE) + 30 * 0.5)
    assert "120 candidates + 1,920 of the starts = 186,240 network" in cost_line(with_starts, PACE)


def test_the_screens_teacher_is_part_of_it_and_each_worker_runs_it() -> None:
    screened = Work(6, 6, 256, 120, 3, 3000, screen=960)
    assert screened.network_evaluations == WORK.network_evaluations + 960
    assert screened.search_seconds(PACE, 4) == pytest.approx(WORK.search_seconds(PACE, 4) + 15 * 0.5)
    assert "120 candidates + 960 of the screen's teacher = 185,280 network" in cost_line(screened, PACE)
    both = cost_line(Work(6, 6, 256, 120, 3, 3000, starts=1920, screen=960), PACE)
    assert "120 candidates + 1,920 of the starts + 960 of the screen's teacher = 187,200 network" in both


def test_nothing_is_left_but_held_out_scores() -> None:
    line = cost_line(Work(6, 6, 256, 0, 3, 3000), PACE)
    assert line == "cost: no candidate is left to search, at most 7.6 minutes of held-out scores on the CPU"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0123, "0.012 seconds"),
        (1, "1 second"),
        (2.44, "2.4 seconds"),
        (9.96, "10 seconds"),
        (99.4, "99 seconds"),
        (100, "1.7 minutes"),
        (754, "13 minutes"),
        (6000, "1.7 hours"),
        (172800, "2 days"),
        (1e7, "116 days"),
    ],
)
def test_durations_are_said_in_two_digits(seconds: float, words: str) -> None:
    assert duration(seconds) == words
