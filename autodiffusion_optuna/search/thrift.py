"""What a child would cost, given the first steps that were tried: the prefix cache answers those again for nothing.

A guess from the finished trials alone, so that it repeats exactly: what a worker's cache really holds depends on its
memory, and on which trials were its own.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import Candidate, Settings
from autodiffusion_optuna.search.history import Record
from autodiffusion_optuna.search.space import SearchSpace

LATELY = 300  # finished trials whose steps the cache may still hold: those of parents are used, and kept, all the time
THRIFT = 1.0  # normal scores by which a child may look worse if it costs nothing instead of a whole run

Pairs = tuple[tuple[int, int], ...]
Tried = dict[tuple[Settings, int], list[Pairs]]
"""Settings and number of steps, without which nothing is shared -> (timestep, skip set) of the candidates, sorted."""


def costs_left(children: Sequence[Candidate], ranked: Sequence[Record], space: SearchSpace) -> NDArray[np.float64]:
    """Share of its network evaluations that each child needs, float64 [M], where the first steps of others are kept.

    ``ranked``: of these the complete trials count; a stopped one kept the steps of its few images alone. The last
    evaluation of a run is needed always: nothing follows that could share it.
    """
    tried = Tried()
    complete = sorted((record for record in ranked if not record.stopped), key=lambda record: record.number)
    for record in complete[-LATELY:]:
        tried.setdefault((record.candidate.settings, record.candidate.steps), []).append(record.candidate.pairs)
    for pairs in tried.values():
        pairs.sort()
    return np.array([_cost_left(child, shared_steps(child, tried), space) for child in children])


def shared_steps(child: Candidate, tried: Tried) -> int:
    """First steps that a child shares with any candidate that was tried."""
    others = tried.get((child.settings, child.steps), [])
    place = bisect(others, child.pairs)  # of all, its neighbours in order begin most alike
    return max((_alike(child.pairs, other) for other in others[max(place - 1, 0) : place + 1]), default=0)


def _alike(one: Pairs, other: Pairs) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=True)))


def _cost_left(child: Candidate, shared: int, space: SearchSpace) -> float:
    visits = space.visits(child.steps, child.settings_dict)
    spared = next((place for place, step in enumerate(visits) if step >= shared), len(visits))
    return 1.0 - min(spared, len(visits) - 1) / len(visits)
