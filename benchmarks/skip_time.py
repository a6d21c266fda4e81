"""Whether saved cost is saved time: predicted against measured seconds over 30 random choices of what layers do.

    OMP_NUM_THREADS=1 python benchmarks/skip_time.py

A random UNet2DModel with attention at two sizes, 28 units, batch 8 at 32x32 on the CPU. Of each choice a number of
units does not run, each of them by a coin skipped or reused. The prediction is the counted cost (multiply-adds); rounds
are interleaved and medians taken, so that a machine that slows down does not tilt them. Prints and writes
``benchmarks/results/skip_time.json``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import record
from diffusers import DDIMScheduler, UNet2DModel

from autodiffusion_optuna.candidate import REUSE, SKIP
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.cost import seconds
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.evaluation.units import Branches

CHOICES, ROUNDS, BATCH = 30, 7, 8


def random_unet(folder: Path) -> None:
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(64, 128, 128, 128),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        random_unet(Path(folder))
        model = load_model(ModelConfig(source=folder, device="cpu", clip=False))
    units = len(model.units)
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, units + 1, CHOICES)
    choices = [
        sum(int(rng.choice([SKIP, REUSE])) << 2 * int(u) for u in rng.choice(units, size, replace=False))
        for size in sizes
    ]
    costs = model.costs("macs")
    x = torch.randn(BATCH, *model.shape, generator=torch.Generator().manual_seed(1))

    earlier = Branches(keep=frozenset(range(units)))
    model.denoiser(x, 700, 0, earlier)

    def evaluate(modes: int) -> object:
        return model.denoiser(x, 500, modes, Branches(earlier.kept))

    for modes in (0, *choices):
        evaluate(modes)
    rounds = [[seconds(evaluate, modes, model.device) for modes in (0, *choices)] for _ in range(ROUNDS)]
    shares = [statistics.median(r[1 + m] / r[0] for r in rounds) for m in range(CHOICES)]
    predicted = [costs.of(modes) / costs.full for modes in choices]
    result = {
        "units": units,
        "choices": CHOICES,
        "correlation of predicted and measured time": float(np.corrcoef(predicted, shares)[0, 1]),
        "predicted share of the full time": [round(share, 4) for share in predicted],
        "measured share of the full time": [round(share, 4) for share in shares],
        "seconds of a full evaluation": statistics.median(r[0] for r in rounds),
    }
    print(json.dumps(result, indent=2), record("skip_time", result))


if __name__ == "__main__":
    main()
