"""Held-out values: a candidate scored on noise that the search never saw. Torch-free."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autodiffusion_optuna.storage.attrs import held_out_key

# Two-sided 95 % points of Student's t by degrees of freedom; beyond 30 the normal point is close enough.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """Values of one candidate on disjoint banks of noise, each of ``images`` images.

    ``warning``: what to know about distances of so many images, None where there is nothing.
    """

    images: int
    values: tuple[float, ...]
    warning: str | None = None

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
        t = T_95[self.banks - 2] if self.banks - 2 < len(T_95) else 1.96
        return t * statistics.stdev(self.values) / math.sqrt(self.banks)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.mean + self.half_width

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {"images": self.images, "values": list(self.values), "warning": self.warning}

    def summary(self) -> dict[str, Any]:
        """As printed by ``adopt show --json``."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "images": self.images, "banks": self.banks}


def stored_held_out(attrs: Mapping[str, Any], candidate_key: str, images: int, banks: int) -> HeldOut | None:
    """Stored held-out values of a candidate on so many images and banks, if any."""
    stored = attrs.get(held_out_key(candidate_key, images, banks))
    return None if stored is None else HeldOut(stored["images"], tuple(stored["values"]), stored.get("warning"))


def largest_held_out(attrs: Mapping[str, Any], *candidate_keys: str) -> tuple[int, int] | None:
    """(images, banks) on which all of these candidates have held-out values, the most images first.

    Distances of different numbers of images do not compare.
    """

    def sizes(candidate_key: str) -> set[tuple[int, int]]:
        prefix = held_out_key(candidate_key, 0, 0).removesuffix("0x0")
        found = (key.removeprefix(prefix).split("x") for key in attrs if key.startswith(prefix))
        return {(int(images), int(banks)) for images, banks in found}

    return max(set.intersection(*map(sizes, candidate_keys)), default=None)
