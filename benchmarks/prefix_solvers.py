"""prefix cache with every solver: bits that differ, and evaluations saved, over random one-gene changes.

    OMP_NUM_THREADS=1 python benchmarks/prefix_solvers.py

A small random UNet2DModel, lists of eight timesteps. A walk of 60 candidates, each a one-gene change of the one before
(a timestep or one unit of a skip set), is run with and without the prefix cache. Prints and writes
``benchmarks/results/prefix_solvers.json``.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import record
from diffusers import DDIMScheduler, UNet2DModel

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, PrefixCache, cached_denoise
from autodiffusion_optuna.evaluation.solvers import SOLVERS, evaluations, times

CANDIDATES, BATCH = 60, 2
START = (960, 840, 700, 560, 420, 280, 140, 30)


def small_unet(folder: Path) -> None:
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder)


def mutated(candidate: Candidate, rng: random.Random, units: int) -> Candidate:
    pairs = list(candidate.pairs)
    i = rng.randrange(len(pairs))
    t, skip = pairs[i]
    if rng.random() < 0.5:
        pairs[i] = (t, skip ^ 1 << rng.randrange(units))
    else:
        pairs[i] = (rng.choice(sorted(set(range(1000)) - set(candidate.timesteps))), skip)
    return Candidate.from_pairs(pairs)


def walk(model: Model, solver: str) -> dict[str, Any]:
    rng = random.Random(0)
    cache, counter = PrefixCache(2**28), NfeCounter()
    x = torch.randn(BATCH, *model.shape, generator=torch.Generator().manual_seed(1))
    candidate, differ = Candidate(START), 0
    for _ in range(CANDIDATES):
        nodes = times(model.schedule, candidate.timesteps, "zero")
        queries = evaluations(solver, candidate.steps, "zero")
        cached, plain = (
            SOLVERS[solver](cached_denoise(model.denoiser, candidate, kept, (), count, queries), x, nodes)
            for kept, count in ((cache, counter), (None, NfeCounter()))
        )
        differ += not torch.equal(cached, plain)
        candidate = mutated(candidate, rng, len(model.units))
    return {"differ": differ, "saved": counter.saved / (counter.saved + counter.run)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        small_unet(Path(folder))
        model = load_model(ModelConfig(source=folder, device="cpu"))
    result = {solver: walk(model, solver) for solver in SOLVERS}
    print(json.dumps(result, indent=2), record("prefix_solvers", result))


if __name__ == "__main__":
    main()
