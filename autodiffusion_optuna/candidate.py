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

RUN, SKIP, REUSE = 0, 1, 2
"""What a unit of the network does at a step.

It runs; its residual branch is left out; or the branch is that of the last step at which the unit ran.
"""
MODES = {"skip": SKIP, "reuse": REUSE}
"""Modes that save something, by name."""


@dataclass(frozen=True)
class Candidate:
    """Timesteps of a sampling run, what each unit does at each of them, and the settings that the study searches.

    ``timesteps``: strictly descending ints in [0, T). ``modes``: one int per timestep with two bits for each of the
    model's units in execution order: bits 2u and 2u + 1 hold the mode of unit u. They belong to their timestep and
    travel with it. ``settings``: name and value of each setting that is searched, ascending by
    name, such as ``("guidance", 4.5), ("solver", "heun")``; a value is a string or a finite float. Settings
    that a study holds fixed are not here. Equal candidates have equal ``key``. Raises ValueError for
    anything else.
    """

    timesteps: tuple[int, ...]
    modes: tuple[int, ...] = ()
    settings: Settings = ()

    def __post_init__(self) -> None:
        if not self.modes:
            object.__setattr__(self, "modes", (0,) * len(self.timesteps))
        if len(self.modes) != len(self.timesteps):
            raise ValueError(f"{len(self.timesteps)} timesteps but modes of {len(self.modes)} steps")
        if not self.timesteps or self.timesteps[-1] < 0 or min(self.modes) < 0:
            raise ValueError(f"timesteps and modes must be non-negative and not empty: {self}")
        if any(skipped(modes) & reused(modes) for modes in self.modes):
            raise ValueError(f"a unit is skipped or reused at a step, not both: {self}")
        if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"timesteps must be strictly descending: {self.timesteps}")
        if self.settings:
            object.__setattr__(self, "settings", tuple(_setting(name, value) for name, value in self.settings))
            if any(a >= b for (a, _), (b, _) in pairwise(self.settings)):
                raise ValueError(f"settings must be ascending by name, each name once: {self.settings}")

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]], settings: Iterable[tuple[str, Value]] = ()) -> Candidate:
        """Candidate of (timestep, modes) pairs in any order; the timesteps must be distinct.

        ``settings``: (name, value) pairs in any order; the names must be distinct.
        """
        ordered = sorted(pairs, reverse=True)
        named = tuple(sorted(settings, key=lambda setting: setting[0]))
        return cls(tuple(t for t, _ in ordered), tuple(modes for _, modes in ordered), named)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(timestep, modes) in execution order."""
        return tuple(zip(self.timesteps, self.modes, strict=True))

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
        """Canonical string: ``"940,613"``, or ``"940:1a,613"`` with the modes in hexadecimal.

        Searched settings come before it: ``"guidance=4.5;solver=heun|940:1a,613"``.
        """
        steps = ",".join(f"{t}:{modes:x}" if modes else str(t) for t, modes in self.pairs)
        return ";".join(f"{name}={value}" for name, value in self.settings) + "|" + steps if self.settings else steps

    @classmethod
    def from_key(cls, key: str) -> Candidate:
        """Inverse of ``key``: a setting's value that reads as a float is one."""
        head, bar, steps = key.rpartition("|")
        named = [field.partition("=") for field in head.split(";")] if bar else []
        fields = [field.partition(":") for field in steps.split(",")]
        return cls(
            tuple(int(t) for t, _, _ in fields),
            tuple(int(modes or "0", 16) for _, _, modes in fields),
            tuple((name, _read(value)) for name, _, value in named),
        )

    def unit_names(self, units: Sequence[str], mode: int) -> list[list[str]]:
        """Names of the units in a mode at each step."""
        return [[units[u] for u in at_step] for at_step in self.units_in(mode)]

    def units_in(self, mode: int) -> list[list[int]]:
        """Indices of the units in a mode at each step."""
        return [[u for u, at_step in unit_modes(modes).items() if at_step == mode] for modes in self.modes]

    def to_json(self) -> dict[str, Any]:
        """Inverse of ``from_json``.

        ``{"timesteps": [int], "skips": [[unit index]], "reuses": [[unit index]]}``, and ``"settings": {name: value}``
        if any are searched.
        """
        steps = {"timesteps": list(self.timesteps), "skips": self.units_in(SKIP), "reuses": self.units_in(REUSE)}
        return {**steps, "settings": self.settings_dict} if self.settings else steps

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        """Inverse of ``to_json``."""
        settings = tuple(sorted(data.get("settings", {}).items()))
        by_step = zip(data["skips"], data["reuses"], strict=True)
        return cls(tuple(data["timesteps"]), tuple(packed(skips, reuses) for skips, reuses in by_step), settings)


def packed(skips: Iterable[int] = (), reuses: Iterable[int] = ()) -> int:
    """Modes of a step at which these units are skipped or reused, by index, and all others run."""
    modes = 0
    for u in skips:
        modes |= SKIP << 2 * u
    for u in reuses:
        modes |= REUSE << 2 * u
    return modes


def unit_modes(modes: int) -> dict[int, int]:
    """Mode by index of the units that do not run, ascending; the inverse of ``packed``."""
    return {u: mode for u in range((modes.bit_length() + 1) // 2) if (mode := modes >> 2 * u & 3)}


def all_units(units: int) -> int:
    """Bit set of ``units`` units as ``skipped`` and its like return: bit 2u stands for unit u."""
    return ((1 << 2 * units) - 1) // 3


def skipped(modes: int) -> int:
    """Units that are skipped, as bits 2u."""
    return modes & all_units((modes.bit_length() + 1) // 2)


def reused(modes: int) -> int:
    """Units whose branch is reused, as bits 2u."""
    return skipped(modes >> 1)


def resting(modes: int) -> int:
    """Units that do not run, as bits 2u."""
    return skipped(modes | modes >> 1)


def grounded(modes: Sequence[int], visited: Sequence[object] | None = None) -> tuple[int, ...]:
    """Modes by step, where a unit that is to reuse a branch and has not run before runs instead.

    ``visited``: whether the network is evaluated at each step; None: it is.
    """
    found, idle = [], -1  # bits 2u of units that have not run
    for step, at_step in enumerate(modes):
        found.append(at_step & ~((reused(at_step) & idle) << 1))
        idle &= resting(found[-1]) if visited is None or visited[step] else -1
    return tuple(found)


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
