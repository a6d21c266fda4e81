"""Noise, and what an image is conditioned on, by image index.

Image i starts from the same noise, and has the same label or prompt, whatever the batch, the order or the candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError

Draw = Literal["balanced", "random"]
"""How conditions are drawn: each equally often, or independently."""

# Streams of randomness beside the noise itself, whose key is (seed, bank, image).
STEP, CONDITION = 1, 2


@lru_cache(maxsize=64)
def _order(seed: int, bank: int, row: int, count: int) -> NDArray[np.int64]:
    """A row of ``count`` conditions, each once. Kept: of a file of 200,000 prompts it takes milliseconds."""
    return np.random.default_rng([seed, bank, row, CONDITION, 1]).permutation(count)


@dataclass(frozen=True)
class Bank:
    """An endless sequence of images-to-be.

    ``seed``: in [0, 2^32). ``bank``: 0 is searched on; 1 and above are held out, to score winners again.
    ``shape``: (C, H, W) of one image's noise. ConfigError for values out of range.
    """

    seed: int
    bank: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, value in (("seed", self.seed), ("bank", self.bank)):
            # numpy splits larger values into several words, and two seeds could then meet.
            if not 0 <= value < 2**32:
                raise ConfigError(f"{name} {value} is out of range; use an integer in [0, 2^32)")

    def noise(self, start: int, stop: int) -> Tensor:
        """Standard normal noise of images ``start`` to ``stop`` - 1, float32 [stop - start, C, H, W].

        Image i depends on (seed, bank, i) only; drawn on the CPU, it is the same for every device and batch.
        """
        noise = np.empty((stop - start, *self.shape), dtype=np.float32)
        for row, image in zip(noise, range(start, stop), strict=True):
            row[...] = self._rng(image).standard_normal(self.shape, dtype=np.float32)
        return torch.from_numpy(noise)

    def step_noise(self, start: int, stop: int, step: int) -> Tensor:
        """Noise that a stochastic solver adds after step ``step``, float32 [stop - start, C, H, W].

        Depends on (seed, bank, image, step) only.
        """
        rows = [self._rng(i, STEP, step + 1).standard_normal(self.shape, dtype=np.float32) for i in range(start, stop)]
        return torch.from_numpy(np.stack(rows))

    def conditions(self, start: int, stop: int, count: int, draw: Draw = "balanced") -> list[int]:
        """Which of ``count`` labels or prompts images ``start`` to ``stop`` - 1 have.

        ``"balanced"``: every ``count`` images in a row have each exactly once, in an order of its own for each such
        row, so any prefix of a bank is as balanced as it can be. ``"random"``: independent and uniform. Depends on
        (seed, bank, image) only.
        """
        if draw == "random":
            return [int(self._rng(image, CONDITION).integers(count)) for image in range(start, stop)]
        rows = {image // count for image in range(start, stop)}
        orders = {row: _order(self.seed, self.bank, row, count) for row in rows}
        return [int(orders[image // count][image % count]) for image in range(start, stop)]

    def _rng(self, image: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.bank, image, *stream])
