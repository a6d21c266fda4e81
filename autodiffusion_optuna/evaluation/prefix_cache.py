"""The prefix cache: candidates that begin alike pay for their common beginning once.

With fixed noise and a deterministic solver, the network's i-th output depends on the queries up to the i-th
and on nothing later: solvers combine states with coefficients of nodes they have already queried, and a
node's own time is part of its query. The path of queries therefore names the output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from autodiffusion_optuna.candidate import REUSE, RUN, Candidate, grounded, unit_modes
from autodiffusion_optuna.evaluation.denoiser import UnitDenoise
from autodiffusion_optuna.evaluation.solvers import Denoise, step_of
from autodiffusion_optuna.evaluation.units import Branches

Path = tuple[Hashable, ...]


@dataclass
class NfeCounter:
    """Network evaluations in units of images: a query of a batch of B counts B.

    ``run``: evaluated. ``saved``: answered from the prefix cache.
    """

    run: int = 0
    saved: int = 0


class PrefixCache:
    """Tensors by path within ``budget_bytes``; the least recently used go first.

    ``nbytes``: bytes held, never above the budget.
    A tensor larger than the whole budget is not stored. Bytes are those of the tensors; the paths that name
    them are some hundred bytes each and not counted. Tensors stay on their device and are handed out as they
    are, not copied, so nobody may write into them; solvers never do.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._kept: OrderedDict[Path, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, path: Path) -> Tensor | None:
        """The tensor at ``path``, now the most recently used, or None."""
        tensor = self._kept.get(path)
        if tensor is not None:
            self._kept.move_to_end(path)
        return tensor

    def put(self, path: Path, tensor: Tensor) -> None:
        """Keep ``tensor`` at ``path``, dropping others until it fits."""
        if tensor.nbytes > self.budget_bytes:
            return
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # a view would keep the whole of its base alive, uncounted
        self.nbytes -= self._kept.pop(path).nbytes if path in self._kept else 0
        while self.nbytes + tensor.nbytes > self.budget_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[path] = tensor
        self.nbytes += tensor.nbytes

    def clear(self) -> None:
        """Drop all tensors."""
        self._kept.clear()
        self.nbytes = 0


def cached_denoise(
    denoiser: UnitDenoise,
    candidate: Candidate,
    prefix_cache: PrefixCache | None = None,
    root: Hashable = (),
    counter: NfeCounter | None = None,
    queries: int | None = None,
) -> Denoise:
    """``denoise(x, t)`` for one run of a solver over one batch, its units in the modes that ``candidate`` has at t.

    A query at a time that is not on the list takes the modes of the step it belongs to (``step_of``).
    Each run and each batch needs a function of its own.

    ``root`` must hold all that decides the result besides the queries: model, precision, clip, conditions and
    guidance scale; solver and its settings; ``final``; K, since the updates near the end may depend on the
    number of steps; and the batch, by image bank and position, since bits depend on the batch size too.
    ``queries``: of a whole run (``solvers.evaluations``). The last one is not cached, since nothing follows that
    another candidate could share; None caches all.
    """
    return _Run(denoiser, candidate, prefix_cache, (root,), counter or NfeCounter(), queries).denoise


@dataclass(eq=False)
class _Query:
    """A query of a run: what was asked, at which step and as its which one; the branches that are kept of it."""

    x: Tensor
    t: float
    step: int
    place: int
    kept: dict[int, list[Any]] = field(default_factory=dict)


class _Run:
    """One run of a solver over one batch.

    A unit that reuses takes the branch of the last step at which it ran; of a step with several queries, that of the
    query in the same place, or of the last one. The cache holds no branches, which are many times larger than images:
    where the query that gave them was answered from it, that one is run after all, once something needs them.
    """

    def __init__(
        self,
        denoiser: UnitDenoise,
        candidate: Candidate,
        prefix_cache: PrefixCache | None,
        path: Path,
        counter: NfeCounter,
        queries: int | None,
    ) -> None:
        self.denoiser, self.candidate = denoiser, candidate
        self.prefix_cache, self.path, self.counter, self.queries = prefix_cache, path, counter, queries
        self.asked: list[_Query] = []
        self.modes = grounded(candidate.modes)
        self.wanted = _wanted(self.modes)

    def denoise(self, x: Tensor, t: float) -> Tensor:
        """The network's answer to the next query, from the cache where it is there."""
        step = step_of(self.candidate.timesteps, t)
        self.path = (*self.path, (t, self.candidate.modes[step]))
        query = _Query(x, t, step, sum(earlier.step == step for earlier in self.asked))
        self.asked.append(query)
        x0 = self.prefix_cache.get(self.path) if self.prefix_cache is not None else None
        if x0 is not None:
            self.counter.saved += len(x)
            return x0
        x0 = self._run(query)
        for earlier in self.asked:  # what neither this step, which may ask again, nor a later one reuses goes
            last = self.wanted[earlier.step]
            earlier.kept = {unit: branch for unit, branch in earlier.kept.items() if last[unit] >= step}
        if self.prefix_cache is not None and len(self.asked) != self.queries:
            self.prefix_cache.put(self.path, x0)
        return x0

    def _run(self, query: _Query) -> Tensor:
        modes, given = self.modes[query.step], {}
        for unit, mode in unit_modes(modes).items():
            if mode == REUSE:
                source = self._source(query, unit)
                if unit not in source.kept:
                    self._run(source)
                given[unit] = source.kept[unit]
        branches = Branches(given, frozenset(self.wanted[query.step]))
        used = given or branches.keep
        x0 = self.denoiser(query.x, query.t, modes, branches) if used else self.denoiser(query.x, query.t, modes)
        self.counter.run += len(query.x)
        query.kept = branches.kept
        return x0

    def _source(self, query: _Query, unit: int) -> _Query:
        """The query whose branch of a unit is reused."""
        ran = [q for q in self.asked if q.step < query.step and not self.modes[q.step] >> 2 * unit & 3]
        last = [q for q in ran if q.step == ran[-1].step]
        return last[min(query.place, len(last) - 1)]


def _wanted(modes: Sequence[int]) -> list[dict[int, int]]:
    """By step, each unit whose branch a later step reuses before it runs again, and the last step that does."""
    wanted: list[dict[int, int]] = [{} for _ in modes]
    for unit in {u for at_step in modes for u in unit_modes(at_step)}:
        ran = None
        for step, at_step in enumerate(modes):
            mode = at_step >> 2 * unit & 3
            if mode == RUN:
                ran = step
            elif mode == REUSE and ran is not None:
                wanted[ran][unit] = step
    return wanted
