from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from autodiffusion_optuna.search.ranks import rank_correlation
from autodiffusion_optuna.search.rungs import ENOUGH_PAIRS, RungRegression


def regression(pairs: list[tuple[float, float]]) -> RungRegression:
    found = RungRegression.of(pairs)
    assert found is not None
    return found


def test_a_rung_that_is_proportional_to_the_end_foretells_it() -> None:
    rung = regression([(x, x / 5) for x in (20.0, 40.0, 90.0, 200.0, 400.0)])
    assert rung.expected([20, 60, 300]) == pytest.approx([4, 12, 60], rel=0.02)
    assert rung.chance_below(300.0, 4.0) < 1e-3
    assert rung.chance_below(15.0, 4.0) > 0.9


def test_any_power_is_learned() -> None:
    rung = regression([(x, x**2) for x in np.geomspace(1, 100, 12)])
    assert rung.expected([10.0]) == pytest.approx([100.0], rel=0.1)


def test_the_more_the_end_scatters_the_less_is_sure() -> None:
    rng = np.random.default_rng(0)
    rungs = np.geomspace(10, 100, 30)
    chances = [
        regression([(x, x * math.exp(noise * e)) for x, e in zip(rungs, rng.normal(size=30), strict=True)])
        .chance_below(20.0, 12.0)
        for noise in (0.02, 0.2, 1.0)
    ]  # fmt: skip
    assert chances[0] < 1e-3 < chances[1] < 0.05 < chances[2]


def test_few_trials_foretell_nothing_and_infinite_ones_do_not_count() -> None:
    assert RungRegression.of([(1.0, 1.0)] * (ENOUGH_PAIRS - 1)) is None
    assert RungRegression.of([(1.0, 1.0), (2.0, 2.0), (math.inf, 3.0), (4.0, math.nan)]) is None


def test_values_that_no_logarithm_takes_are_compared_by_their_spread() -> None:
    pairs = [(x, 0.1 * x - 0.3) for x in np.linspace(-1, 5, 12)]
    rung = regression(pairs)
    assert rung.expected([0.0, 4.0]) == pytest.approx([-0.3, 0.1], abs=0.03)
    assert rung.chance_below(5.0, -0.3) < 0.01 < 0.5 < rung.chance_below(-1.0, -0.3)
    assert regression([(0.0, 0.0)] * 5).expected([0.0]) == pytest.approx([0.0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_at_the_rung_is_none_at_the_end(value: float) -> None:
    assert regression([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]).chance_below(value, 1.0) == 0


def test_what_no_complete_trial_reached_is_better_than_all() -> None:
    rung = regression([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])
    assert rung.chance_below(0.0, 1.0) == rung.chance_below(-1.0, 1.0) == 1
    assert rung.expected([0.0, math.nan, 2.0]).tolist()[:2] == [0, math.inf]


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 9, 40)
    other = one + rng.integers(0, 9, 40)
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_few_trials_must_agree_wholly_and_many_in_the_main() -> None:
    assert regression([(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]).ranks
    assert not regression([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)]).ranks
    rng = np.random.default_rng(1)
    ends = rng.lognormal(size=100)
    assert regression([(end * math.exp(e), end) for end, e in zip(ends, rng.normal(size=100), strict=True)]).ranks
    assert not regression([(e, end) for end, e in zip(ends, rng.lognormal(size=100), strict=True)]).ranks
    assert not regression([(1.0, end) for end in ends]).ranks
