"""Arithmetic of searches: what was best after how much was spent, and what that is worth on held-out noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

Spent = Sequence[tuple[int, str]]
"""(evaluations spent so far, key of the best candidate so far) after each candidate."""
Winners = Sequence[tuple[int, str]]
"""(evaluations spent so far, key of the candidate that is the best from then on)."""
Curve = Sequence[tuple[float, float]]
"""(evaluations spent, held-out distance of the winner had the search ended there), in the order of time."""


def reached(ratios: Sequence[float], within: float) -> int | None:
    """Candidates until the best is within so much of the optimum; None where it never is."""
    return next((n for n, ratio in enumerate(ratios, 1) if ratio <= within), None)


def ratio_at(ratios: Sequence[float], n: int) -> float:
    """The ratio after ``n`` candidates, the last one where there were fewer."""
    return ratios[min(n, len(ratios)) - 1]


def median(numbers: Sequence[float | None]) -> float | None:
    """The median, None counting as never; None where that is it."""
    found = statistics.median(math.inf if number is None else number for number in numbers)
    return found if math.isfinite(found) else None


def changes(spent: Spent) -> list[tuple[int, str]]:
    """The first moment of each winner, and the very last one."""
    found = [now for now, before in zip(spent, [None, *spent], strict=False) if before is None or now[1] != before[1]]
    return found if found[-1][0] == spent[-1][0] else [*found, spent[-1]]


def thinned(winners: Sequence[tuple[int, T]], factor: float) -> list[tuple[int, T]]:
    """Of winners, or a curve, only those that stood each time the evaluations had grown by a factor, and the last."""
    kept, moment = [winners[0]], winners[0][0] * factor
    while moment < winners[-1][0]:
        standing = max((winner for winner in winners if winner[0] <= moment), key=lambda winner: winner[0])
        kept += [standing] if standing != kept[-1] else []
        moment *= factor
    return kept if kept[-1] == winners[-1] else [*kept, winners[-1]]


def held_out_curve(
    winners: Sequence[tuple[int, str]], values: Mapping[str, Sequence[float]]
) -> list[tuple[int, float]]:
    """Winners with the mean of their values over the held-out banks."""
    return [(evaluations, statistics.fmean(values[key])) for evaluations, key in winners]


def first_no_worse(curve: Curve, target: float) -> float | None:
    """Evaluations after which the winner, had the search stopped there, is no worse than ``target``."""
    return next((evaluations for evaluations, value in curve if value <= target), None)


def stays_no_worse(curve: Curve, target: float) -> float | None:
    """Evaluations from which every later winner is no worse than ``target`` either."""
    found = None
    for evaluations, value in curve:
        if value > target:
            found = None
        elif found is None:
            found = evaluations
    return found


def at(curve: Curve, evaluations: float) -> float | None:
    """The held-out distance of the winner at so many evaluations; None before the first."""
    return next((value for spent, value in reversed(curve) if spent <= evaluations), None)


def median_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Median over seeds at every moment at which one of them changes, from where all have a winner."""
    found: list[tuple[float, float]] = []
    for moment in sorted({spent for curve in curves for spent, _ in curve}):
        values = [value for curve in curves if (value := at(curve, moment)) is not None]
        if len(values) == len(curves):
            found.append((moment, statistics.median(values)))
    return found
