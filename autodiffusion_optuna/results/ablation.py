"""The ablation of a winner: which single change from uniform and from the defaults earned how much. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autodiffusion_optuna.candidate import REUSE, SKIP, Candidate, Value
from autodiffusion_optuna.results.held_out import Difference, HeldOut, largest_held_out, paired, stored_held_out


@dataclass(frozen=True)
class Undone:
    """The winner with one of its changes undone; ``name`` says which."""

    name: str
    candidate: Candidate


@dataclass(frozen=True)
class Change:
    """What one change of the winner earned: ``difference`` is the candidate without it minus the winner."""

    name: str
    candidate: Candidate
    held_out: HeldOut
    difference: Difference

    def to_json(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``."""
        return {
            "change": self.name,
            "timesteps": list(self.candidate.timesteps),
            "settings": self.candidate.settings_dict,
            "held_out": self.held_out.summary(),
            "difference": self.difference.summary(),
        }


def undo_each(best: Candidate, codec: Mapping[str, Any]) -> list[Undone]:
    """The winner with each of its changes undone, one at a time; a change that is none is left out.

    A timestep goes to the place it has among as many uniform ones, or as near to it as its neighbours allow: they stay
    where they are, and so do order and smallest gap. A searched setting goes to its first value, of a range to the
    middle. A step's layers all run. The budget is left aside. Neighbours in the list share their first
    steps, the longest shared ones first, which the prefix cache then gives twice. ``codec``: ``SearchSpace.codec``.
    """
    return [*_timesteps(best, codec["T"], codec["min_gap"]), *_modes(best), *_settings(best, codec)]


def _timesteps(best: Candidate, T: int, gap: int) -> list[Undone]:
    from autodiffusion_optuna.search.repair import spread
    from autodiffusion_optuna.search.timesteps import uniform_timesteps

    uniform, found = spread(uniform_timesteps(T, best.steps), T, gap), best.timesteps
    undone = []
    for i in reversed(range(best.steps)):
        lowest = found[i + 1] + gap if i + 1 < best.steps else 0
        highest = found[i - 1] - gap if i else T - 1
        place = min(max(uniform[i], lowest), highest)
        if place != found[i]:
            short = "" if place == uniform[i] else f", as near to {uniform[i]} as its neighbours allow"
            moved = replace(best, timesteps=(*found[:i], place, *found[i + 1 :]))
            undone.append(Undone(f"step {i + 1}: timestep {found[i]} back to {place}{short}", moved))
    return undone


def _modes(best: Candidate) -> list[Undone]:
    resting = [
        list(filter(None, (_count(skips, "skipped"), _count(reuses, "reused"))))
        for skips, reuses in zip(best.units_in(SKIP), best.units_in(REUSE), strict=True)
    ]
    return [
        Undone(
            f"step {i + 1}: all layers run, {' and '.join(resting[i])} before",
            replace(best, modes=(*best.modes[:i], 0, *best.modes[i + 1 :])),
        )
        for i in reversed(range(best.steps))
        if best.modes[i]
    ]


def _count(units: Sequence[int], what: str) -> str:
    return f"{len(units)} {what}" if units else ""


def _settings(best: Candidate, codec: Mapping[str, Any]) -> list[Undone]:
    chosen, undone = best.settings_dict, []
    for name, default in default_settings(codec).items():
        if name in chosen and chosen[name] != default:
            settings = tuple(sorted({**chosen, name: default}.items()))
            undone.append(Undone(f"{name} {chosen[name]} back to {default}", replace(best, settings=settings)))
    return undone


def default_settings(codec: Mapping[str, Any]) -> dict[str, Value]:
    """Each searched setting's default, as ``SearchSpace.default_settings``."""
    first: dict[str, Value] = {name: values[0] for name, values in codec["choices"].items()}
    return first | {name: round((low + high) / 2, 3) for name, (low, high) in codec["ranges"].items()}


def ablation_of(
    attrs: Mapping[str, Any], best: Candidate, size: tuple[int, int] | None, codec: Mapping[str, Any]
) -> list[Change]:
    """What each change earned, the most first, as far as it was scored on held-out banks that the winner has too.

    ``size``: (images, banks) of these; None: those on which most of the changes were scored.
    """
    undone, changes = undo_each(best, codec), []
    size = size or _most_scored(attrs, best, undone)
    own = stored_held_out(attrs, best.key, *size) if size else None
    if size is None or own is None:
        return []
    for change in undone:
        scored = stored_held_out(attrs, change.candidate.key, *size)
        difference = scored and paired(scored, own)
        if scored and difference:
            changes.append(Change(change.name, change.candidate, scored, difference))
    return sorted(changes, key=lambda change: -change.difference.mean)


def _most_scored(attrs: Mapping[str, Any], best: Candidate, undone: list[Undone]) -> tuple[int, int] | None:
    """(images, banks) on which the winner and most of ``undone`` were scored, the most images of equals."""

    def scored(size: tuple[int, int]) -> int:
        return sum(stored_held_out(attrs, change.candidate.key, *size) is not None for change in undone)

    sizes = (largest_held_out(attrs, best.key, change.candidate.key) for change in undone)
    return max((size for size in sizes if size), key=lambda size: (scored(size), size), default=None)
