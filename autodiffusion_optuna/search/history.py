"""What the trials of a study say: which candidates are taken, which are best, which stage it is.

Pure functions of trials. Nothing here is stored: whoever asks reads it anew.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate

Losses = tuple[float, ...]
FAILED_TRIES = 2  # a candidate that failed so often is not proposed again
RAMP = 5  # generations in which the share of skippable units grows to ``max_skip`` (AutoDiffusion)


class Record(NamedTuple):
    """A trial as the search sees it; in the order of the fields, the better of two comes first.

    ``losses``: values of a complete trial, made to be minimised; empty for any other.
    """

    losses: Losses
    number: int
    key: str
    candidate: Candidate


@dataclass(frozen=True)
class History:
    """What is known when a trial is asked for.

    ``index``: its number, not counting failed trials before it. ``taken``: keys of all candidates that are
    finished, pruned, running or waiting, or failed repeatedly. ``complete``: trials; ``indices``: theirs.
    ``ranked``: the complete trials in their order as records, which with one objective is best first.
    """

    index: int
    taken: set[str]
    complete: list[Record]
    indices: list[int]
    ranked: list[Record]

    def before(self, index: int) -> History:
        """Without the values of trials from ``index`` on; what they try stays taken."""
        kept = [i for i, place in enumerate(self.indices) if place < index]
        complete = [self.complete[i] for i in kept]
        return replace(self, complete=complete, indices=[self.indices[i] for i in kept], ranked=sorted(complete))


RecordOf = Callable[[FrozenTrial], Record | None]
"""Record of a trial, None for a foreign one."""


class Reading:
    """Trials read so far, in the order of their numbers."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._complete: list[Record] = []
        self._indices: list[int] = []
        self._ranked: list[Record] = []
        self._failed: Counter[str] = Counter()
        self._failures: list[int] = []

    def copy(self) -> Reading:
        """One that goes its own way from here."""
        other = Reading()
        other._taken, other._failed = set(self._taken), Counter(self._failed)
        other._complete, other._indices = list(self._complete), list(self._indices)
        other._ranked, other._failures = list(self._ranked), list(self._failures)
        return other

    def add(self, trial: FrozenTrial, record_of: RecordOf) -> None:
        """Read one more trial."""
        record = record_of(trial)
        if trial.state == TrialState.FAIL:
            self._failures.append(trial.number)
            self._failed.update([record.key] if record else [])
        elif record is not None:
            self._taken.add(record.key)
            if record.losses:
                self._complete.append(record)
                self._indices.append(trial.number - len(self._failures))
                insort(self._ranked, record)

    def history(self, number: int) -> History:
        """What trial ``number`` sees; nothing may be read any more."""
        repeatedly = {key for key, times in self._failed.items() if times >= FAILED_TRIES}
        index = number - bisect_left(self._failures, number)
        return History(index, self._taken | repeatedly, self._complete, self._indices, self._ranked)


class HistoryReader:
    """Reads histories of one study again and again: finished trials before all that are not are read once.

    What was read is replaced as a whole and never changed, so that threads may ask at the same time.
    """

    def __init__(self) -> None:
        self._read: tuple[Sequence[FrozenTrial], int, Reading] = ((), 0, Reading())

    def history(self, trials: Sequence[FrozenTrial], number: int, record_of: RecordOf) -> History:
        """History as trial ``number`` sees it, itself left out; ``trials`` ascend by number."""
        ends, count, reading = self._read
        # Optuna keeps the very objects of finished trials.
        same = 0 < count <= len(trials) and trials[0] is ends[0] and trials[count - 1] is ends[1]
        if not same or ends[1].number >= number:
            count, reading = 0, Reading()
        reading = reading.copy()
        known = count
        while count < len(trials) and trials[count].state.is_finished() and trials[count].number < number:
            reading.add(trials[count], record_of)
            count += 1
        if count > known:
            self._read = ((trials[0], trials[count - 1]), count, reading)
            reading = reading.copy()
        for trial in trials[count:]:
            if trial.number != number:
                reading.add(trial, record_of)
        return reading.history(number)


def parameters(trial: FrozenTrial) -> Mapping[str, Any]:
    """A trial's parameters; of an unfinished one also those it was enqueued with."""
    if trial.state.is_finished():
        return trial.params
    enqueued: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
    return {**enqueued, **trial.params}


def losses(values: Sequence[float], directions: Sequence[StudyDirection]) -> Losses:
    """Values made to be minimised; one that is not finite is worse than all others."""
    signed = (-v if d == StudyDirection.MAXIMIZE else v for v, d in zip(values, directions, strict=True))
    return tuple(v if math.isfinite(v) else math.inf for v in signed)


def best(ranked: Sequence[Record], count: int) -> list[Record]:
    """The best distinct candidates, best first: by (value, number), or by Pareto rank for several objectives.

    ``ranked``: complete trials in their order, as in a History. Of a front that does not fit in whole, an even choice
    from one end to the other.
    """
    several = bool(ranked) and len(ranked[0].losses) > 1
    ordered = _by_front(ranked, count) if several else ranked
    chosen: dict[str, Record] = {}
    for record in ordered:
        if len(chosen) == count:
            break
        chosen.setdefault(record.key, record)
    return list(chosen.values())


def _by_front(complete: Sequence[Record], count: int) -> list[Record]:
    distinct: dict[str, Record] = {}
    for record in complete:
        distinct.setdefault(record.key, record)
    left = list(distinct.values())
    chosen: list[Record] = []
    while left and len(chosen) < count:
        front = pareto_front([record.losses for record in left])
        members = sorted(left[i] for i in front)
        places = min(count - len(chosen), len(members))
        evenly = np.linspace(0, len(members) - 1, places).round().astype(int)
        chosen += [members[i] for i in evenly]
        dropped = set(front)
        left = [record for i, record in enumerate(left) if i not in dropped]
    return chosen


def pareto_front(points: Sequence[Losses]) -> list[int]:
    """Indices of the points that no other dominates, ascending; equal points are all in."""
    values = np.asarray(points, dtype=np.float64)
    alive = np.ones(len(values), dtype=np.bool_)
    for i in np.lexsort(values.T[::-1]):
        # In lexicographic order a point still alive is dominated by none that follow.
        if alive[i]:
            no_better, worse = (values >= values[i]).all(axis=1), (values > values[i]).any(axis=1)
            alive &= ~(no_better & worse)
    return [int(i) for i in np.flatnonzero(alive)]


def bests_by_generation(history: History, population_size: int, generations: int) -> list[int | None]:
    """Number of the best trial after each of the first ``generations``; None while there is none.

    With several objectives there is no single best, and all are None.
    """
    bests: list[int | None] = [None] * generations
    top: Record | None = None
    for record, index in zip(history.complete, history.indices, strict=True):
        generation = index // population_size
        if generation >= generations or len(record.losses) > 1:
            break
        top = record if top is None else min(top, record)
        bests[generation] = top.number
    for generation in range(1, generations):
        if bests[generation] is None:
            bests[generation] = bests[generation - 1]
    return bests


def stage_two_start(bests: Sequence[int | None], stage_one_generations: int) -> int:
    """First generation of stage two, as far as ``bests`` (one entry per past generation) can tell.

    It is ``stage_one_generations``, or earlier the first generation g >= 2 before which the best trial
    stayed the same through the whole of generation g - 1.
    """
    for generation in range(2, min(len(bests), stage_one_generations) + 1):
        before, after = bests[generation - 2], bests[generation - 1]
        if after is not None and before == after:
            return generation
    return stage_one_generations


def share_at(generation: int, start: int, max_skip: float) -> float:
    """Largest share of units that a step may skip: 0 before ``start``, then fifths of ``max_skip``."""
    return max_skip * min(max(generation - start + 1, 0), RAMP) / RAMP
