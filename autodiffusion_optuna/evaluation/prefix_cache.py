"""The prefix cache: candidates that begin alike pay for their common beginning once.

With fixed noise and a deterministic solver, the network's i-th output depends on the queries up to the i-th
and on nothing later: solvers combine states with coefficients of nodes they have already queried, and a
node's own time is part of its query. The path of queries therefore names the output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.evaluation.denoiser import SkippingDenoise
from autodiffusion_optuna.evaluation.solvers import Denoise, step_of

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
    denoiser: SkippingDenoise,
    candidate: Candidate,
    prefix_cache: PrefixCache | None = None,
    root: Hashable = (),
    counter: NfeCounter | None = None,
    queries: int | None = None,
) -> Denoise:
    """``denoise(x, t)`` for one run of a solver over one batch, skipping what ``candidate`` skips at t.

    A query at a time that is not on the list takes the skip set of the step it belongs to (``step_of``).
    Each run and each batch needs a function of its own.

    ``root`` must hold all that decides the result besides the queries: model, precision, clip, conditions and
    guidance scale; solver and its settings; ``final``; K, since the updates near the end may depend on the
    number of steps; and the batch, by image bank and position, since bits depend on the batch size too.
    ``queries``: of a whole run (``solvers.evaluations``). The last one is not cached, since nothing follows that
    another candidate could share; None caches all.
    """
    path: Path = (root,)
    counted = counter or NfeCounter()

    def denoise(x: Tensor, t: float) -> Tensor:
        nonlocal path
        skip = candidate.skips[step_of(candidate.timesteps, t)]
        path = (*path, (t, skip))
        x0 = prefix_cache.get(path) if prefix_cache is not None else None
        if x0 is not None:
            counted.saved += len(x)
            return x0
        x0 = denoiser(x, t, skip)
        counted.run += len(x)
        if prefix_cache is not None and len(path) - 1 != queries:
            prefix_cache.put(path, x0)
        return x0

    return denoise
