"""What the screen and the rungs of a study decided, and how well they rank. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.search.ranks import rank_correlation
from autodiffusion_optuna.storage.attrs import CANDIDATE, SCREEN
from autodiffusion_optuna.storage.trials import FINISHED, stored_score


@dataclass(frozen=True)
class Rung:
    """Candidates at one number of images.

    ``screen``: whether they are compared with the teacher there, and not with the reference. ``reached``, ``stopped``:
    finished candidates that came so far, and that were not let on. ``rank_correlation``: Spearman's, of the value here
    with the last one, over the ``complete`` candidates; these are the better ones, so it is lower than over all. None
    where there are too few to tell.
    """

    images: int
    screen: bool
    reached: int
    stopped: int
    rank_correlation: float | None
    complete: int


@dataclass(frozen=True)
class Race:
    """The rungs of a study, from few images to many, and what a candidate cost.

    ``complete``: candidates scored on all images. ``evaluations``: of the network, by image, run for a finished
    candidate on average.
    """

    rungs: tuple[Rung, ...]
    complete: int
    evaluations: float

    def text(self) -> str:
        """One line: who was stopped where, and how that place ranks."""
        parts = []
        for rung in self.rungs:
            ranks = "" if rung.rank_correlation is None else f" (rank correlation {rung.rank_correlation:.2f})"
            what = "screen" if rung.screen else "rung"
            parts.append(f"{rung.stopped:,} of {rung.reached:,} stopped by the {what} of {rung.images:,} images{ranks}")
        return f"race: {', '.join(parts)}, {self.complete:,} in full; {self.evaluations:,.0f} network calls a candidate"

    def to_json(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``."""
        return asdict(self)


def race_of(trials: Sequence[FrozenTrial], images: int) -> Race | None:
    """What the trials say; None where none reported a value before the last. ``images``: those of a whole score."""
    finished = [t for t in trials if t.state in FINISHED and CANDIDATE in t.user_attrs]
    counts = sorted({step for trial in finished for step in trial.intermediate_values if step < images})
    if not counts:
        return None
    complete = [t for t in finished if t.state == TrialState.COMPLETE and t.values]
    run = sum(stored_score(trial).get("run", 0) for trial in finished)
    return Race(tuple(_rung(finished, complete, count) for count in counts), len(complete), run / len(finished))


def stopped_at(trial: FrozenTrial) -> int | None:
    """Images after which a pruner stopped the trial; None for any other."""
    return max(trial.intermediate_values, default=None) if trial.state == TrialState.PRUNED else None


def _rung(finished: Sequence[FrozenTrial], complete: Sequence[FrozenTrial], images: int) -> Rung:
    reached = [t for t in finished if images in t.intermediate_values]
    both = [(t.intermediate_values[images], t.values[0]) for t in complete if images in t.intermediate_values]
    return Rung(
        images,
        screen=any(len(t.system_attrs.get(SCREEN, ())) == images for t in reached),
        reached=len(reached),
        stopped=sum(stopped_at(t) == images for t in reached),
        rank_correlation=rank_correlation(*zip(*both, strict=True)) if len(both) > 2 else None,
        complete=len(both),
    )
