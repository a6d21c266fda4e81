"""Floors: what no list of few timesteps can be expected to beat. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autodiffusion_optuna.candidate import Candidate, Settings
from autodiffusion_optuna.storage.attrs import MANY_STEPS, REAL_FLOOR


@dataclass(frozen=True)
class RealFloor:
    """The distance of real images from the reference: what a perfect model would have with as many images.

    ``images``: real ones, which the other ``against`` images do not hold. ``value`` is None where it cannot be told,
    and ``note`` says why; else ``note`` says what was compared.
    """

    value: float | None
    images: int
    against: int | None
    note: str

    def to_json(self) -> dict[str, Any]:
        """As stored, and as printed by ``adopt show --json``."""
        return asdict(self)


def many_steps(T: int, steps: int, best: Candidate) -> Candidate | None:
    """Uniform timesteps, ``steps`` of them or the whole grid, with all settings of ``best``; None where no more."""
    from autodiffusion_optuna.search.timesteps import uniform_timesteps

    steps = min(steps, T)
    return None if steps <= best.steps else Candidate(uniform_timesteps(T, steps), settings=best.settings)


def stored_many_steps(attrs: Mapping[str, Any], settings: Settings) -> tuple[Candidate, float] | None:
    """The floor of many steps that was scored last and its cost, where it has these settings."""
    stored = attrs.get(MANY_STEPS)
    if stored is None:
        return None
    candidate = Candidate.from_key(stored["candidate"])
    return (candidate, stored["cost"]) if candidate.settings == settings else None


def stored_real_floor(attrs: Mapping[str, Any]) -> RealFloor | None:
    """What is stored of real images."""
    stored = attrs.get(REAL_FLOOR)
    return None if stored is None else RealFloor(**stored)
