"""On CUDA in bfloat16: the ranking of float32 on the CPU, images scored a second, overhead over the bare network.

    python benchmarks/gpu.py

Two models: the bundled digits, and a random UNet of 128 channels at 32x32. Thirty candidates each (baselines
and seeded random ones, four steps). Needs a CUDA device; prints and writes ``benchmarks/results/gpu.json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import record
from diffusers import DDIMScheduler, UNet2DModel
from scipy.stats import spearmanr

from autodiffusion_optuna import Candidate, SearchSpace
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.models import DIGITS, Model, load_model
from autodiffusion_optuna.evaluation.references.reference import build_reference, load_reference
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.search.operators import random_candidate
from autodiffusion_optuna.search.timesteps import baseline_timesteps

CANDIDATES, STEPS, WARM_UP = 30, 4, 2


def random_unet(folder: Path) -> None:
    """A 128-channel network with seeded random weights, as a diffusers folder."""
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder)
    DDIMScheduler().save_pretrained(folder)


def candidates(model: Model) -> list[Candidate]:
    space = SearchSpace(T=model.schedule.T, min_steps=STEPS, max_steps=STEPS)
    known = dict.fromkeys(Candidate(t) for t in baseline_timesteps(model.schedule, STEPS).values())
    rng = np.random.default_rng(0)
    return [*known, *(random_candidate(rng, space, 0.0) for _ in range(CANDIDATES - len(known)))]


def evaluator(source: str, device: str, precision: str, batch: int) -> Evaluator:
    model = load_model(ModelConfig(source=source, device=device, precision=precision))
    if source == "digits":
        extractor = load_extractor("digits", model.device)
        reference = load_reference(DIGITS / "reference.npz", extractor)
    else:
        extractor = load_extractor("pixels", model.device)
        noise = Bank(1, 9, model.shape).noise(0, 2048)  # any fixed reference ranks the candidates
        reference = build_reference(model.to_images(noise * 0.5), extractor, "noise")
    return Evaluator(model, Sampling(), extractor, reference, batch=batch)


def bare_seconds(model: Model, evaluations: int, batch: int) -> float:
    x = Bank(0, 0, model.shape).noise(0, batch).to(model.device)
    for t in (0, 500):
        model.denoiser(x, t, 0)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for i in range(evaluations // batch):
        model.denoiser(x, float(i % model.schedule.T), 0)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(source: str, images: int, cpu_batch: int, gpu_batch: int) -> dict[str, Any]:
    cpu = evaluator(source, "cpu", "float32", cpu_batch)
    gpu = evaluator(source, "cuda", "bfloat16", gpu_batch)
    listed = candidates(gpu.model)
    for candidate in listed[:WARM_UP]:
        gpu.score(candidate, [images])
    started = time.perf_counter()
    scores = [gpu.score(candidate, [images]) for candidate in listed]
    wall = time.perf_counter() - started
    run = sum(score.run for score in scores)
    bare = bare_seconds(gpu.model, run, gpu_batch)
    exact = [cpu.score(candidate, [images]).value for candidate in listed]
    return {
        "images a candidate": images,
        "candidates": len(listed),
        "spearman, bfloat16 on CUDA against float32 on the CPU": float(
            spearmanr([score.value for score in scores], exact).statistic
        ),
        "images scored a second": images * len(listed) / wall,
        "wall over bare network time": wall / bare,
        "peak GPU memory, MiB": torch.cuda.max_memory_allocated() / 2**20,
        "seconds by phase": {p: sum(vars(s.seconds)[p] for s in scores) for p in vars(scores[0].seconds)},
    }


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none")
    with tempfile.TemporaryDirectory() as folder:
        random_unet(Path(folder))
        result = {
            "digits": compare("digits", 1024, 64, 1024),
            "random UNet, 128 channels": compare(folder, 128, 16, 128),
        }
    print(json.dumps(result, indent=2), record("gpu", result))


if __name__ == "__main__":
    main()
