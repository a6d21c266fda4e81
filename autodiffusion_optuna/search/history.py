"""What the trials of a study say: which candidates are taken, which are best, which stage it is."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.storage.attrs import CANDIDATE

Losses = tuple[float, ...]
FAILED_TRIES = 2  # a candidate that failed so often is not proposed again
RAMP = 5  # generations in which the ratio of units that a step may skip grows to ``max_skip`` (AutoDiffusion)


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

    ``index``: its number, not counting failed trials before it. ``objectives``: how many there are. ``taken``: keys of
    all candidates that are finished, pruned, running or waiting, or failed repeatedly. ``complete``: trials by number;
    ``indices``: theirs.
    """

    index: int
    objectives: int
    taken: set[str]
    complete: list[Record]
    indices: list[int]

    @cached_property
    def ranked(self) -> list[Record]:
        """Complete trials by (losses, number), which with one objective is best first."""
        # ``complete`` is by number and sorting is stable; the losses alone are compared faster than whole records.
        return sorted(self.complete, key=attrgetter("losses"))

    def before(self, index: int) -> History:
        """Without the values of trials from ``index`` on; what they try stays taken."""
        count = bisect_left(self.indices, index)
        return replace(self, complete=self.complete[:count], indices=self.indices[:count])


NEVER: tuple[None, None] = None, None


class HistoryReader:
    """Reads the trials of studies again and again; each finished one is decoded once, for it never changes again."""

    def __init__(self) -> None:
        self._finished: dict[str, dict[int, tuple[FrozenTrial, Record | None]]] = {}

    def history(self, space: SearchSpace, study: optuna.Study, trials: Sequence[FrozenTrial], number: int) -> History:
        """History as trial ``number`` sees it, itself left out; ``trials`` of the study ascend by number."""
        directions = study.directions
        finished = self._finished.setdefault(study.study_name, {})
        failures: list[int] = []
        failed: Counter[str] = Counter()
        history = History(number, len(directions), set(), [], [])
        for trial in trials:
            place = trial.number
            if place == number:
                continue
            seen, record = finished.get(place, NEVER)
            # Optuna keeps the very objects of finished trials; another study of this name has other ones.
            if seen is not trial and (seen is None or seen.datetime_complete != trial.datetime_complete):
                record = read_record(trial, space, directions)
                if trial.state.is_finished():
                    finished[place] = trial, record
            if trial.state is TrialState.FAIL:
                failures.append(place)
                failed.update([record.key] if record else [])
            elif record is not None:
                history.taken.add(record.key)
                if record.losses:
                    history.complete.append(record)
                    history.indices.append(place - len(failures))
        history.taken.update(key for key, times in failed.items() if times >= FAILED_TRIES)
        return replace(history, index=number - bisect_left(failures, number))


def read_record(trial: FrozenTrial, space: SearchSpace, directions: Sequence[StudyDirection]) -> Record | None:
    """A trial's record; None where it tries no candidate of the space.

    A trial that is begun carries its candidate's key first, and gets its parameters one by one after it.
    """
    candidate = decoded(parameters(trial), space) or published(trial, space)
    if candidate is None:
        return None
    complete = trial.state == TrialState.COMPLETE and trial.values
    return Record(losses(trial.values, directions) if complete else (), trial.number, candidate.key, candidate)


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
