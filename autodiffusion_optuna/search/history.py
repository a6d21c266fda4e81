"""What the trials of a study say: which candidates are taken, which are best, which stage it is."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from itertools import accumulate, takewhile
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.rungs import RungRegression
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.storage.attrs import CANDIDATE, FAILURE, GIVEN_UP

Losses = tuple[float, ...]
FAILED_TRIES = 2  # a candidate that failed so often is not proposed again
LEARNED_FROM = 256  # latest complete trials that tell what a rung foretells: an ask must not grow with the study
RAMP = 5  # generations in which the ratio of units that a step may skip grows to ``max_skip`` (AutoDiffusion)


class Record(NamedTuple):
    """A trial as the search sees it; in the order of the fields, the better of two comes first.

    ``losses``: values of a complete trial, made to be minimised; empty for any other, or, of a stopped one, what they
    would have been (``expected``). ``rungs``: (step, loss) of what was reported on the way, by step. ``stopped``: by a
    pruner.
    """

    losses: Losses
    number: int
    key: str
    candidate: Candidate
    rungs: tuple[tuple[int, float], ...] = ()
    stopped: bool = False


@dataclass(frozen=True)
class History:
    """What is known when a trial is asked for.

    ``index``: its number, not counting failed trials before it. ``taken``: keys of all candidates that are finished,
    pruned, running or waiting, or failed repeatedly. ``complete``: trials by number; ``indices``: theirs. ``ranked``:
    the same by (losses, number), which with one objective is best first. ``stopped``: trials that a pruner stopped, by
    number; ``stopped_indices``: theirs. ``failures``: numbers of failed trials; ``failed``: how often a candidate did.
    """

    index: int = 0
    objectives: int = 1
    taken: set[str] = field(default_factory=set)
    complete: list[Record] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    ranked: list[Record] = field(default_factory=list)
    stopped: list[Record] = field(default_factory=list)
    stopped_indices: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def extended(self, trials: Sequence[FrozenTrial], record_of: Callable[[FrozenTrial], Record | None]) -> History:
        """With more trials, which have larger numbers. ``record_of``: a trial's record, None for a foreign one."""
        if not trials:
            return self
        parts = {part.name: copy(getattr(self, part.name)) for part in fields(self)}
        new = History(**parts)
        for trial in trials:
            record = record_of(trial)
            if trial.state == TrialState.FAIL:
                new.failures.append(trial.number)
                new.failed.update([record.key] if record and not _is_given_up(trial) else [])
            elif record is not None:
                new.taken.add(record.key)
                if record.losses:
                    new.complete.append(record)
                    new.indices.append(trial.number - len(new.failures))
                    new.ranked.append(record)
                elif record.stopped:
                    new.stopped.append(record)
                    new.stopped_indices.append(trial.number - len(new.failures))
        new.taken.update(key for key, times in new.failed.items() if times >= FAILED_TRIES)
        new.ranked.sort(key=attrgetter("losses"))  # which keeps the order of numbers
        return new

    def before(self, index: int) -> History:
        """Without the values of trials from ``index`` on; what they try stays taken."""
        count, stopped = bisect_left(self.indices, index), bisect_left(self.stopped_indices, index)
        complete = self.complete[:count]
        return replace(
            self,
            complete=complete,
            indices=self.indices[:count],
            ranked=sorted(complete),
            stopped=self.stopped[:stopped],
            stopped_indices=self.stopped_indices[:stopped],
        )


def _is_given_up(trial: FrozenTrial) -> bool:
    return str(trial.user_attrs.get(FAILURE, "")).startswith(GIVEN_UP)


class HistoryReader:
    """Reads histories of studies again and again; the finished trials before all that are not are read once.

    What was read is replaced as a whole and never changed, so that threads may ask at the same time.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[FrozenTrial, int, History]] = {}  # last trial read, number of them, what they say
        self._records: dict[tuple[str, int], tuple[datetime, Record | None]] = {}

    def history(self, space: SearchSpace, study: optuna.Study, trials: Sequence[FrozenTrial], number: int) -> History:
        """History as trial ``number`` sees it, itself left out; ``trials`` of the study ascend by number."""
        name, directions = study.study_name, study.directions

        def record_of(trial: FrozenTrial) -> Record | None:
            """Decoded once, where the trial is finished: it never changes again."""
            finished_at = trial.datetime_complete
            if finished_at is None:
                return read_record(trial, space, directions)
            stored = self._records.get((name, trial.number))
            if stored is None or stored[0] != finished_at:
                stored = finished_at, read_record(trial, space, directions)
                self._records[name, trial.number] = stored
            return stored[1]

        count, known = 0, History(objectives=len(directions))
        if name in self._read:
            last, length, history = self._read[name]
            # Optuna keeps the very objects of finished trials.
            if last.number < number and length <= len(trials) and trials[length - 1] is last:
                count, known = length, history
        ended = list(takewhile(lambda trial: trial.state.is_finished() and trial.number < number, trials[count:]))
        if ended:
            count, known = count + len(ended), known.extended(ended, record_of)
            self._read[name] = ended[-1], count, known
        history = known.extended([trial for trial in trials[count:] if trial.number != number], record_of)
        return replace(history, index=number - bisect_left(history.failures, number))


def read_record(trial: FrozenTrial, space: SearchSpace, directions: Sequence[StudyDirection]) -> Record | None:
    """A trial's record; None where it tries no candidate of the space.

    A trial that is begun carries its candidate's key first, and gets its parameters one by one after it.
    """
    candidate = decoded(parameters(trial), space) or published(trial, space)
    if candidate is None:
        return None
    complete = trial.state == TrialState.COMPLETE and trial.values
    told = losses(trial.values, directions) if complete else ()
    reported = sorted(trial.intermediate_values.items()) if len(directions) == 1 else []
    rungs = tuple((step, losses([value], directions)[0]) for step, value in reported)
    stopped = trial.state == TrialState.PRUNED and bool(rungs)
    return Record(told, trial.number, candidate.key, candidate, rungs, stopped)


def decoded(params: Mapping[str, Any], space: SearchSpace) -> Candidate | None:
    """Candidate of parameter values; None where they are incomplete or not of this space."""
    try:
        return space.decode(params)
    except (ConfigError, TypeError, ValueError, OverflowError):
        return None


def published(trial: FrozenTrial, space: SearchSpace) -> Candidate | None:
    """Candidate whose key the trial carries; None without one, or where it is not canonical in this space."""
    key = trial.user_attrs.get(CANDIDATE)
    try:
        candidate = Candidate.from_key(key) if isinstance(key, str) else None
    except ValueError:
        return None
    return candidate if candidate is not None and space.is_canonical(candidate) else None


def tried(
    trial: FrozenTrial, space: SearchSpace, proposed: Candidate, draw: Callable[[str, BaseDistribution], Any]
) -> Candidate:
    """What ``space.suggest`` decodes for a trial: its parameters, and of the candidate it was begun with or else
    ``proposed`` those left open. ``draw``: gives a parameter that neither has, of a later step.

    Raises ConfigError for enqueued values that are no candidate's.
    """
    values = {**space.encode(published(trial, space) or proposed), **parameters(trial)}
    candidate = decoded(values, space)
    if candidate is not None:
        return candidate
    for name, distribution in space.distributions().items():
        if name not in values:
            values[name] = draw(name, distribution)
    try:
        return space.decode(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the enqueued parameters are no candidate: {error}") from None


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


def expected(history: History) -> list[Record]:
    """All trials that say how good their candidate is, best first: complete ones, and stopped ones by what their last
    rung foretells of the end, as far as the latest complete ones tell.
    """
    by_step: dict[int, list[Record]] = {}
    for record in history.stopped:
        by_step.setdefault(record.rungs[-1][0], []).append(record)
    complete = [(dict(record.rungs), record.losses[0]) for record in history.complete[-LEARNED_FROM:]]
    found = list(history.complete)
    for step, stopped in by_step.items():
        rung = RungRegression.of((rungs[step], end) for rungs, end in complete if step in rungs)
        if rung is not None:
            ends = rung.expected([record.rungs[-1][1] for record in stopped])
            found += [Record((float(end),), *record[1:]) for record, end in zip(stopped, ends, strict=True)]
    return history.ranked if len(found) == len(history.complete) else sorted(found)


def best(ranked: Sequence[Record], count: int) -> list[Record]:
    """The best distinct candidates, best first: by (value, number), or by Pareto rank for several objectives.

    ``ranked``: complete trials in their order, as in a History. Of a front that does not fit in whole, an even choice
    from one end to the other.
    """
    distinct: dict[str, Record] = {}
    several = bool(ranked) and len(ranked[0].losses) > 1
    for record in ranked:
        if not several and len(distinct) == count:
            break
        distinct.setdefault(record.key, record)
    return _by_front(list(distinct.values()), count) if several else list(distinct.values())


def _by_front(left: list[Record], count: int) -> list[Record]:
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


def stage_two_start(history: History, population_size: int, latest: int) -> int:
    """First generation of stage two, as far as the past generations can tell; ``latest`` at the latest.

    It is the first generation g >= 2 before which the best trial stayed the same through the whole of generation
    g - 1. With several objectives there is no single best, and it is ``latest``.
    """
    if history.objectives > 1:
        return latest
    past = min(history.index // population_size, latest)
    early = history.before(past * population_size)
    bests = [None, *accumulate(early.complete, min)]  # after none, one, two ... complete trials
    after = [bests[bisect_left(early.indices, generation * population_size)] for generation in range(past + 1)]
    for generation in range(2, past + 1):
        if after[generation] is not None and after[generation] is after[generation - 1]:
            return generation
    return latest


def skip_ratio_at(generation: int, start: int, max_skip: float) -> float:
    """Largest ratio of units that a step may skip: 0 before ``start``, then fifths of ``max_skip``."""
    return max_skip * min(max(generation - start + 1, 0), RAMP) / RAMP
