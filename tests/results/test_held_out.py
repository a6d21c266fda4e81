"""Held-out values: intervals, and differences that are paired by bank."""

from __future__ import annotations

import math
import statistics

import pytest

from autodiffusion_optuna.results.held_out import (
    Difference,
    HeldOut,
    begun_held_out,
    largest_held_out,
    paired,
    significant,
    stored_held_out,
)
from autodiffusion_optuna.storage.attrs import held_out_key


def stored(key: str, *scored: HeldOut) -> dict[str, object]:
    return {held_out_key(key, held_out.images, held_out.banks): held_out.to_json() for held_out in scored}


def test_a_paired_interval_by_hand() -> None:
    """Banks differ by far more than the two candidates do on each of them."""
    ours, theirs = HeldOut(100, (10.0, 20.0, 30.0, 40.0, 50.0)), HeldOut(100, (11.0, 22.0, 31.0, 42.0, 51.0))
    difference = paired(ours, theirs)
    assert difference is not None
    assert difference.values == (-1.0, -2.0, -1.0, -2.0, -1.0)
    assert difference.mean == pytest.approx(-1.4)
    # Variance (3 * 0.4^2 + 2 * 0.6^2) / 4 = 0.3; t of 4 degrees of freedom is 2.776.
    assert difference.half_width == pytest.approx(2.776 * math.sqrt(0.3 / 5))
    assert difference.clear
    assert ours.low < theirs.high  # the two unpaired intervals overlap widely
    assert ours.high > theirs.low


@pytest.mark.parametrize(("banks", "t"), [(2, 12.706), (31, 2.042), (32, 2.0395), (61, 2.0003), (100, 1.9842)])
def test_intervals_of_many_banks_are_not_too_narrow(banks: int, t: float) -> None:
    scored = HeldOut(10, tuple(float(bank % 2) for bank in range(banks)))
    spread = statistics.stdev(scored.values) / math.sqrt(banks)
    assert scored.half_width / spread == pytest.approx(t, rel=1e-3)


def test_a_difference_whose_interval_holds_zero_is_not_clear() -> None:
    assert not Difference(10, (-1.0, 1.0, 0.5)).clear
    assert not Difference(10, (0.0, 0.0, 0.0)).clear
    assert Difference(10, (1.0, 1.1, 0.9)).clear


def test_only_banks_of_equal_images_are_paired() -> None:
    five, three = HeldOut(64, (1.0, 2.0, 3.0, 4.0, 5.0)), HeldOut(64, (1.0, 1.0, 1.0))
    difference = paired(five, three)
    assert difference is not None
    assert difference.values == (0.0, 1.0, 2.0)
    assert paired(five, HeldOut(65, five.values)) is None
    assert paired(five, HeldOut(64, (1.0,))) is None


def test_more_banks_hold_fewer_and_the_largest_common_size_is_found() -> None:
    attrs = stored("1", HeldOut(64, (1.0, 2.0, 3.0, 4.0, 5.0), "few")) | stored(
        "2", HeldOut(64, (1.0, 2.0, 3.0)), HeldOut(32, (7.0, 8.0))
    )
    assert stored_held_out(attrs, "1", 64, 3) == HeldOut(64, (1.0, 2.0, 3.0), "few")
    assert stored_held_out(attrs, "2", 64, 5) is None
    assert begun_held_out(attrs, "2", 64, 5) == (1.0, 2.0, 3.0)
    assert begun_held_out(attrs, "2", 128, 5) == ()
    assert largest_held_out(attrs, "1", "2") == (64, 3)
    assert largest_held_out(attrs, "1") == (64, 5)
    assert largest_held_out(attrs, "1", "3") is None


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(6942.3, 4, "6,942"), (11234.5, 4, "11,230"), (0.53486, 4, "0.5349"), (158.2, 2, "160"), (1e-9, 2, "1e-09")],
)
def test_numbers_are_written_out(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


def test_a_difference_shows_its_sign() -> None:
    assert Difference(10, (1.0, 1.2)).text.startswith("+1.1 ± ")
    assert Difference(10, (-1.0, -1.2)).text.startswith("-1.1 ± ")
