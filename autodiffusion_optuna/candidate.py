"""Candidate: the one value that crosses the project."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

Value = str | float
Settings = tuple[tuple[str, Value], ...]
"""(name, value) of each searched setting, ascending by name."""

RESERVED = frozenset("=;|,")
"""Characters that the canonical string is built with."""


@dataclass(frozen=True)
class Candidate:
    """Timesteps of a sampling run, the units skipped at each of them, and the settings that the study searches.

    ``timesteps``: strictly descending ints in [0, T). ``skips``: one int per timestep, a bit set over the
    model's skippable units in execution order (bit u set: unit u is skipped). A bit set belongs to its
    timestep and travels with it. ``settings``: name and value of each setting that is searched, ascending by
    name, such as ``("guidance", 4.5), ("solver", "heun")``; a value is a string or a finite float. Settings
    that a study holds fixed are not here. Equal candidates have equal ``key``. Raises ValueError for
    anything else.
    """

    timesteps: tuple[int, ...]
    skips: tuple[int, ...] = ()
    settings: Settings = ()

    def __post_init__(self) -> None:
        if not self.skips:
            object.__setattr__(self, "skips", (0,) * len(self.timesteps))
        if len(self.skips) != len(self.timesteps):
            raise ValueError(f"{len(self.timesteps)} timesteps but {len(self.skips)} skip sets")
        if not self.timesteps or self.timesteps[-1] < 0 or min(self.skips) < 0:
            raise ValueError(f"timesteps and skips must be non-negative and not empty: {self}")
        if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"timesteps must be strictly descending: {self.timesteps}")
        if self.settings:
            object.__setattr__(self, "settings", tuple(_setting(name, value) for name, value in self.settings))
            if any(a >= b for (a, _), (b, _) in pairwise(self.settings)):
                raise ValueError(f"settings must be ascending by name, each name once: {self.settings}")

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]], settings: Iterable[tuple[str, Value]] = ()) -> Candidate:
        """Candidate of (timestep, skip set) pairs in any order; the timesteps must be distinct.

        ``settings``: (name, value) pairs in any order; the names must be distinct.
        """
        ordered = sorted(pairs, reverse=True)
        named = tuple(sorted(settings, key=lambda setting: setting[0]))
        return cls(tuple(t for t, _ in ordered), tuple(s for _, s in ordered), named)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(timestep, skip set) in execution order."""
        return tuple(zip(self.timesteps, self.skips, strict=True))

    @property
    def steps(self) -> int:
        """Number of timesteps."""
        return len(self.timesteps)

    @property
    def settings_dict(self) -> dict[str, Value]:
        """Value of each searched setting by name."""
        return dict(self.settings)

    @cached_property
    def key(self) -> str:
        """Canonical string: ``"940,613"``, or ``"940:1a,613"`` with the skip sets in hexadecimal.

        Searched settings come before it: ``"guidance=4.5;solver=heun|940:1a,613"``.
        """
        steps = ",".join(f"{t}:{s:x}" if s else str(t) for t, s in self.pairs)
        return ";".join(f"{name}={value}" for name, value in self.settings) + "|" + steps if self.settings else steps

    @classmethod
    def from_key(cls, key: str) -> Candidate:
        """Inverse of ``key``: a setting's value that reads as a float is one."""
        head, bar, steps = key.rpartition("|")
        named = [field.partition("=") for field in head.split(";")] if bar else []
        fields = [field.partition(":") for field in steps.split(",")]
        return cls(
            tuple(int(t) for t, _, _ in fields),
            tuple(int(s or "0", 16) for _, _, s in fields),
            tuple((name, _read(value)) for name, _, value in named),
        )

    def skip_names(self, units: Sequence[str]) -> list[list[str]]:
        """Names of the units skipped at each step."""
        return [[units[u] for u in unit_indices(skip)] for skip in self.skips]

    def to_json(self) -> dict[str, Any]:
        """``{"timesteps": [int], "skips": [[unit index]]}``, and ``"settings": {name: value}`` if any are searched."""
        steps = {"timesteps": list(self.timesteps), "skips": [unit_indices(s) for s in self.skips]}
        return {**steps, "settings": self.settings_dict} if self.settings else steps

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        """Inverse of ``to_json``."""
        settings = tuple(sorted(data.get("settings", {}).items()))
        return cls(tuple(data["timesteps"]), tuple(skip_set(s) for s in data["skips"]), settings)


def unit_indices(skip: int) -> list[int]:
    """Unit indices in a bit set, ascending."""
    return [u for u in range(skip.bit_length()) if skip >> u & 1]


def skip_set(indices: Iterable[int]) -> int:
    """Bit set of unit indices; the inverse of ``unit_indices``."""
    skip = 0
    for index in indices:
        skip |= 1 << index
    return skip


def _setting(name: str, value: Value) -> tuple[str, Value]:
    """The setting with its value as a plain str or float; ValueError where the canonical string could not hold it."""
    if not name or RESERVED & set(name):
        raise ValueError(f"a setting's name must not be empty or hold any of = ; | , but is {name!r}")
    if isinstance(value, str):
        if not value or RESERVED & set(value) or isinstance(_read(value), float):
            raise ValueError(f"setting {name}={value!r} must not be empty, look like a number or hold any of = ; | ,")
        return str(name), str(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"setting {name}={value!r} must be a string or a finite number")
    return str(name), float(value) + 0.0  # -0.0 equals 0.0 and must not have another key


def _read(value: str) -> Value:
    """A setting's value as it stands in a key."""
    try:
        return float(value)
    except ValueError:
        return value
