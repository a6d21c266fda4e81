"""Held-out values: a candidate scored on noise that the search never saw. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autodiffusion_optuna.storage.attrs import held_out_key

# Two-sided 95 % points of Student's t by degrees of freedom; beyond 30 see ``half_width``.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def significant(value: float, digits: int = 4, sign: str = "") -> str:
    """A number to so many digits, without powers of ten where it is not tiny; ``sign``: "+" to show it always."""
    return f"{float(f'{value:.{digits}g}'):{sign},.15g}"


@dataclass(frozen=True)
class Banks:
    """One number for each of several disjoint banks of noise, each of ``images`` images."""

    images: int
    values: tuple[float, ...]

    @property
    def banks(self) -> int:
        """Number of banks."""
        return len(self.values)

    @property
    def size(self) -> tuple[int, int]:
        """(images, banks), in the order in which more is better."""
        return self.images, self.banks

    @property
    def mean(self) -> float:
        """Mean over the banks."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half the 95 % Student interval of the mean; needs two banks."""
        freedom = self.banks - 1
        t = T_95[freedom - 1] if freedom <= len(T_95) else 1.96 + 2.47 / freedom  # within 0.001
        return t * statistics.stdev(self.values) / math.sqrt(self.banks)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + self.half_width

    @property
    def text(self) -> str:
        """Mean and half width of the 95 % interval."""
        return f"{significant(self.mean)} ± {significant(self.half_width, 2)}"

    def summary(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "images": self.images, "banks": self.banks}


@dataclass(frozen=True)
class HeldOut(Banks):
    """Values of one candidate on held-out banks.

    ``warning``: what to know about distances of so many images, None where there is nothing.
    """

    warning: str | None = None

    def first(self, banks: int) -> HeldOut:
        """Those of the first ``banks`` banks."""
        return replace(self, values=self.values[:banks])

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {"images": self.images, "values": list(self.values), "warning": self.warning}


@dataclass(frozen=True)
class Difference(Banks):
    """How far the values of one candidate are from those of another on the same banks, bank by bank.

    What a bank's noise does to both of them cancels, so that this interval is narrower than either's own. Below 0 the
    candidate is better.
    """

    @property
    def text(self) -> str:
        """Mean, with its sign, and half width of the 95 % interval."""
        return f"{significant(self.mean, 3, '+')} ± {significant(self.half_width, 2)}"

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval excludes 0: chance alone does not explain the difference."""
        return self.low > 0 or self.high < 0

    def summary(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``, with the difference of each bank."""
        return {**super().summary(), "values": list(self.values), "clear": self.clear}


def paired(candidate: HeldOut, other: HeldOut) -> Difference | None:
    """``candidate`` minus ``other`` on the banks that both were scored on; None for unequal images or one bank."""
    banks = min(candidate.banks, other.banks)
    if candidate.images != other.images or banks < 2:
        return None
    pairs = zip(candidate.values[:banks], other.values[:banks], strict=True)
    return Difference(candidate.images, tuple(ours - theirs for ours, theirs in pairs))


def stored_held_out(attrs: Mapping[str, Any], candidate_key: str, images: int, banks: int) -> HeldOut | None:
    """Stored held-out values of a candidate on so many images and banks, the first ones where more are stored."""
    most = _most_banks(attrs, candidate_key).get(images, 0)
    return None if most < banks else _read(attrs[held_out_key(candidate_key, images, most)]).first(banks)


def begun_held_out(attrs: Mapping[str, Any], candidate_key: str, images: int, banks: int) -> tuple[float, ...]:
    """Values of the first banks of ``images`` that are stored already, at most ``banks`` of them."""
    most = _most_banks(attrs, candidate_key).get(images)
    return () if most is None else _read(attrs[held_out_key(candidate_key, images, most)]).values[:banks]


def largest_held_out(attrs: Mapping[str, Any], *candidate_keys: str) -> tuple[int, int] | None:
    """(images, banks) on which all of these candidates have held-out values, the most images first.

    Distances of different numbers of images do not compare.
    """
    found = [_most_banks(attrs, key) for key in candidate_keys]
    common = set[int].intersection(*(set(banks) for banks in found))
    return max(((images, min(banks[images] for banks in found)) for images in common), default=None)


def _most_banks(attrs: Mapping[str, Any], candidate_key: str) -> dict[int, int]:
    """Images -> most banks of them on which a candidate has stored values."""
    prefix = held_out_key(candidate_key, 0, 0).removesuffix("0x0")
    sizes = (key.removeprefix(prefix).split("x") for key in attrs if key.startswith(prefix))
    most: dict[int, int] = {}
    for images, banks in sizes:
        most[int(images)] = max(most.get(int(images), 0), int(banks))
    return most


def _read(stored: Mapping[str, Any]) -> HeldOut:
    return HeldOut(stored["images"], tuple(stored["values"]), stored.get("warning"))
