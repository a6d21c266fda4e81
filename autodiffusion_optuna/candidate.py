"""Candidate: the one value that crosses the project."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """Timesteps of a sampling run and the units skipped at each of them.

    ``timesteps``: strictly descending ints in [0, T). ``skips``: one int per timestep, a bit set over the
    model's skippable units in execution order (bit u set: unit u is skipped). A bit set belongs to its
    timestep and travels with it. Equal candidates have equal ``key``.
    """

    timesteps: tuple[int, ...]
    skips: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.skips:
            object.__setattr__(self, "skips", (0,) * len(self.timesteps))
        if len(self.skips) != len(self.timesteps):
            raise ValueError(f"{len(self.timesteps)} timesteps but {len(self.skips)} skip sets")
        if not self.timesteps or self.timesteps[-1] < 0 or min(self.skips) < 0:
            raise ValueError(f"timesteps and skips must be non-negative and not empty: {self}")
        if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"timesteps must be strictly descending: {self.timesteps}")

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> Candidate:
        """Candidate of (timestep, skip set) pairs in any order; the timesteps must be distinct."""
        ordered = sorted(pairs, reverse=True)
        return cls(tuple(t for t, _ in ordered), tuple(s for _, s in ordered))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(timestep, skip set) in execution order."""
        return tuple(zip(self.timesteps, self.skips, strict=True))

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.timesteps)

    @property
    def key(self) -> str:
        """Canonical string: ``"940,613"``, or ``"940:1a,613"`` with the skip sets in hexadecimal."""
        return ",".join(f"{t}:{s:x}" if s else str(t) for t, s in self.pairs)

    @classmethod
    def from_key(cls, key: str) -> Candidate:
        """Inverse of ``key``."""
        fields = [field.partition(":") for field in key.split(",")]
        return cls(tuple(int(t) for t, _, _ in fields), tuple(int(s or "0", 16) for _, _, s in fields))

    def skip_names(self, units: Sequence[str]) -> list[list[str]]:
        """Names of the units skipped at each step."""
        return [[units[u] for u in unit_indices(skip)] for skip in self.skips]

    def to_json(self) -> dict[str, Any]:
        """``{"timesteps": [int], "skips": [[unit index]]}``."""
        return {"timesteps": list(self.timesteps), "skips": [unit_indices(s) for s in self.skips]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        """Inverse of ``to_json``."""
        return cls(tuple(data["timesteps"]), tuple(skip_set(s) for s in data["skips"]))


def unit_indices(skip: int) -> list[int]:
    """Unit indices in a bit set, ascending."""
    return [u for u in range(skip.bit_length()) if skip >> u & 1]


def skip_set(indices: Iterable[int]) -> int:
    """Bit set of unit indices; the inverse of ``unit_indices``."""
    skip = 0
    for index in indices:
        skip |= 1 << index
    return skip
