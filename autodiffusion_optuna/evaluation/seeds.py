"""Noise by image index: image i starts from the same noise whatever the batch, the order or the candidate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError

SEARCH_BANK = 0


@dataclass(frozen=True)
class Bank:
    """An endless row of images-to-be.

    ``seed``: in [0, 2^32). ``bank``: 0 is searched on; 1 and above are fresh rows that re-score winners.
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

    def _rng(self, image: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.bank, image])
