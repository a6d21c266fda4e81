"""Train the bundled digits model and its extractor.

    python benchmarks/train_digits.py extractor --data digits.npz    # minutes
    python benchmarks/train_digits.py reference --data digits.npz    # seconds, after the extractor
    python benchmarks/train_digits.py model     --data digits.npz    # over an hour on two cores

``digits.npz`` holds ``x`` uint8 [10000, 28, 28] and ``y`` int [10000] (MNIST digits, see the model card).
A seeded permutation sets 1,000 digits aside; neither network sees them. Everything is written to
``autodiffusion_optuna/assets/digits``; interrupted training of the model goes on from its last checkpoint.
The part ``reference`` also writes the held-out digits to ``tests/data``, where the tests find them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.features.bundled import DigitsNet
from autodiffusion_optuna.evaluation.frechet import frechet_distance
from autodiffusion_optuna.evaluation.references.reference import Reference, build_reference, save_reference

ASSETS = Path(__file__).parent.parent / "autodiffusion_optuna" / "assets" / "digits"
TEST_DIGITS = Path(__file__).parent.parent / "tests" / "data" / "digits_heldout.npz"
SEED = 0
HELD_OUT = 1000

EXTRACTOR_EPOCHS = 40
EXTRACTOR_BATCH = 128
EXTRACTOR_LR = 3e-3

MODEL_ITERATIONS = 7000
MODEL_BATCH = 64
MODEL_LR = 1e-3
MODEL_EMA = 0.999
WARMUP = 200
CHECKPOINT_EVERY = 500
TRAIN_TIMESTEPS = 1000

# 92 M multiply-adds an image: cheap at 28x28, wide at 7x7 where most of the parameters are.
UNET = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32, 80),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}


def load_split(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images uint8 [9000, 1, 28, 28] and labels, then the 1,000 held-out ones."""
    with np.load(path, allow_pickle=False) as data:
        images = torch.from_numpy(data["x"]).unsqueeze(1)
        labels = torch.from_numpy(data["y"].astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(images)))
    kept, held = order[HELD_OUT:], order[:HELD_OUT]
    return images[kept], labels[kept], images[held], labels[held]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12 degrees, scale by 0.9 to 1.1 and shift by up to 2.5 pixels, each image by its own draw."""
    draw = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = draw[0] * math.radians(12), 1 + 0.1 * draw[1]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = draw[2:] * 2.5 / 14
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], dim=1), torch.stack([sin, cos, shift[1]], dim=1)], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train_extractor(data: Path) -> None:
    torch.manual_seed(SEED)
    images, labels, held_images, held_labels = load_split(data)
    generator = torch.Generator().manual_seed(SEED)
    net = DigitsNet()
    steps = EXTRACTOR_EPOCHS * (len(images) // EXTRACTOR_BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), lr=EXTRACTOR_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, EXTRACTOR_LR, total_steps=steps)
    started = time.monotonic()
    for epoch in range(EXTRACTOR_EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(EXTRACTOR_BATCH)[: len(images) // EXTRACTOR_BATCH]:
            batch = augment(images[rows].float() / 255, generator)
            loss = F.cross_entropy(net(batch), labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
    net.eval()
    with torch.inference_mode():
        score = float((net(held_images.float() / 255).argmax(1) == held_labels).float().mean())
    save_file(net.state_dict(), ASSETS / "extractor.safetensors")
    record("extractor", accuracy=score, held_out=HELD_OUT, seconds=time.monotonic() - started)
    print(f"held-out accuracy {score:.4f}")


def write_reference(data: Path) -> None:
    images, _, held_images, held_labels = load_split(data)
    extractor = load_extractor("digits", "cpu")
    reference = build_reference(images, extractor, dataset="digits-train")
    save_reference(ASSETS / "reference.npz", reference)
    TEST_DIGITS.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(TEST_DIGITS, x=held_images.squeeze(1).numpy(), y=held_labels.numpy().astype(np.uint8))
    keep({"floor": {"extractor": "digits", "values": real_distances(extractor(held_images), reference)}})


def real_distances(features: Tensor, reference: Reference) -> dict[int, float]:
    """Distance of so many real images, the mean over all disjoint groups of as many."""
    groups = {size: features[: len(features) // size * size].split(size) for size in (100, 200, 250, 500, 1000)}
    return {
        size: sum(frechet_distance(group, reference) for group in split) / len(split) for size, split in groups.items()
    }


def train_model(data: Path, checkpoint: Path) -> None:
    torch.manual_seed(SEED)
    images = load_split(data)[0].float() / 127.5 - 1
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN_TIMESTEPS)  # linear betas, epsilon prediction
    abar = scheduler.alphas_cumprod
    model = UNet2DModel(**UNET)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=MODEL_LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    first, spent = restore(checkpoint, model, ema, optimiser, generator)
    started, running = time.monotonic() - spent, 0.0
    for step in range(first, MODEL_ITERATIONS):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        rows = torch.randint(len(images), (MODEL_BATCH,), generator=generator)
        noise = torch.randn(MODEL_BATCH, 1, 28, 28, generator=generator)
        # One timestep per equal slice of [0, T): the same mean as independent draws, less variance.
        slices = (torch.arange(MODEL_BATCH) + torch.rand(MODEL_BATCH, generator=generator)) / MODEL_BATCH
        timesteps = (slices * TRAIN_TIMESTEPS).long()
        signal = abar[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * images[rows] + (1 - signal).sqrt() * noise
        loss = F.mse_loss(model(noisy, timesteps).sample, noise)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update_ema(ema, model, step, MODEL_EMA)
        running += loss.item()
        if (step + 1) % 100 == 0:
            print(f"{step + 1}: loss {running / 100:.5f}, {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, model, ema, optimiser, generator, step + 1, time.monotonic() - started)
    model.load_state_dict(ema)
    model.save_pretrained(ASSETS / "unet")
    scheduler.save_pretrained(ASSETS / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (ASSETS / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    record(
        "model",
        parameters=sum(p.numel() for p in model.parameters()),
        iterations=MODEL_ITERATIONS,
        batch=MODEL_BATCH,
        seconds=time.monotonic() - started,
    )


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARMUP)
    return MODEL_LR * warm * 0.5 * (1 + math.cos(math.pi * step / MODEL_ITERATIONS))


def update_ema(ema: dict[str, Tensor], model: UNet2DModel, step: int, limit: float) -> None:
    decay = min(limit, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            ema[name].lerp_(value, 1 - decay)


def save_checkpoint(path, model, ema, optimiser, generator, step, seconds) -> None:
    state = {
        "model": model.state_dict(),
        "ema": ema,
        "optimiser": optimiser.state_dict(),
        "generator": generator.get_state(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def restore(path, model, ema, optimiser, generator) -> tuple[int, float]:
    """Load a checkpoint if there is one; the iteration to go on with and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    ema.update(state["ema"])
    optimiser.load_state_dict(state["optimiser"])
    generator.set_state(state["generator"])
    return state["step"], state["seconds"]


def record(part: str, **facts: object) -> None:
    """Keep the facts of one part of the training."""
    keep({part: {"seed": SEED, "torch": torch.__version__, "threads": torch.get_num_threads(), **facts}})


def keep(facts: dict[str, object]) -> None:
    """Merge into ``training.json``, which the model card is written from."""
    path = ASSETS / "training.json"
    so_far = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**so_far, **facts}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("extractor", "reference", "model"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("digits-checkpoint.pt"))
    arguments = parser.parse_args()
    ASSETS.mkdir(parents=True, exist_ok=True)
    if arguments.part == "extractor":
        train_extractor(arguments.data)
    elif arguments.part == "reference":
        write_reference(arguments.data)
    else:
        train_model(arguments.data, arguments.checkpoint)


if __name__ == "__main__":
    main()
