"""Train the bundled faces model and its extractor.

    python benchmarks/train_faces.py model     --data faces.npz    # over an hour on two cores
    python benchmarks/train_faces.py extractor --data faces.npz    # minutes
    python benchmarks/train_faces.py reference --data faces.npz    # seconds, after the extractor

``faces.npz`` holds ``x`` uint8 [12000, 32, 32, 3] and ten attributes uint8 [12000] (see the model card).
A seeded permutation sets 1,000 faces aside; neither network sees them. Everything is written to
``autodiffusion_optuna/assets/faces``; interrupted training of the model goes on from its last checkpoint.
The part ``reference`` also writes 200 of the held-out faces to ``tests/data``, where the tests find them.
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
from train_digits import real_distances, restore, save_checkpoint, update_ema

from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.features.bundled import FacesNet
from autodiffusion_optuna.evaluation.references.reference import build_reference, save_reference

ASSETS = Path(__file__).parent.parent / "autodiffusion_optuna" / "assets" / "faces"
TEST_FACES = Path(__file__).parent.parent / "tests" / "data" / "faces_heldout.npz"
SEED = 0
HELD_OUT = 1000

EXTRACTOR_EPOCHS = 12
EXTRACTOR_BATCH = 128
EXTRACTOR_LR = 3e-3

ITERATIONS = 4500
BATCH = 32
LR = 1e-3
EMA = 0.999
WARMUP = 200
CHECKPOINT_EVERY = 250
TRAIN_TIMESTEPS = 1000

# Wide where images are small, for that is where parameters are cheap.
UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (24, 48, 80, 112),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}


def load_split(path: Path) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Training images uint8 [11000, 3, 32, 32] and attributes, then those of the 1,000 held-out faces."""
    with np.load(path, allow_pickle=False) as data:
        images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).contiguous()
        attributes = {name: torch.from_numpy(data[name].astype(np.int64)) for name in data.files if name != "x"}
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(images)))
    kept, held = order[HELD_OUT:], order[:HELD_OUT]
    return (
        images[kept],
        {name: labels[kept] for name, labels in attributes.items()},
        images[held],
        {name: labels[held] for name, labels in attributes.items()},
    )


def train_extractor(data: Path) -> None:
    torch.manual_seed(SEED)
    images, labels, held_images, held_labels = load_split(data)
    generator = torch.Generator().manual_seed(SEED)
    net = FacesNet()
    steps = EXTRACTOR_EPOCHS * (len(images) // EXTRACTOR_BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), lr=EXTRACTOR_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, EXTRACTOR_LR, total_steps=steps)
    started = time.monotonic()
    for epoch in range(EXTRACTOR_EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(EXTRACTOR_BATCH)[: len(images) // EXTRACTOR_BATCH]:
            logits = net(shifted(images[rows].float() / 255, generator))
            loss = sum(
                (F.cross_entropy(logits[name], labels[name][rows], label_smoothing=0.05) for name in labels),
                torch.zeros(()),
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)
    net = net.half().float().eval()  # as it is stored
    with torch.inference_mode():
        logits = net(held_images.float() / 255)
    scores = {name: float((logits[name].argmax(1) == held_labels[name]).float().mean()) for name in labels}
    save_file({name: value.half() for name, value in net.state_dict().items()}, ASSETS / "extractor.safetensors")
    record("extractor", accuracy=scores, held_out=HELD_OUT, seconds=time.monotonic() - started)
    print(f"held-out accuracy {scores}")


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by up to two pixels each way, its edge pixels repeated."""
    down, right = torch.randint(5, (2,), generator=generator).tolist()
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return padded[..., down : down + 32, right : right + 32]


def write_reference(data: Path) -> None:
    images, _, held_images, _ = load_split(data)
    extractor = load_extractor("faces", "cpu")
    reference = build_reference(images, extractor, dataset="faces-train")
    save_reference(ASSETS / "reference.npz", reference)
    np.savez_compressed(TEST_FACES, x=held_images[:200].permute(0, 2, 3, 1).numpy())
    keep({"floor": {"extractor": "faces", "values": real_distances(extractor(held_images), reference)}})


def train_model(data: Path, checkpoint: Path) -> None:
    torch.manual_seed(SEED)
    images = load_split(data)[0].float() / 127.5 - 1
    # Of v rather than epsilon: at high noise, where the background's colour is settled, an error of epsilon is one of
    # the image a hundred times as large.
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, prediction_type="v_prediction")  # linear betas
    abar = scheduler.alphas_cumprod
    model = UNet2DModel(**UNET)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    first, spent = restore(checkpoint, model, ema, optimiser, generator)
    started, running = time.monotonic() - spent, 0.0
    for step in range(first, ITERATIONS):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 3, 32, 32, generator=generator)
        # One timestep per equal slice of [0, T): the same mean as independent draws, less variance.
        slices = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timesteps = (slices * TRAIN_TIMESTEPS).long()
        signal = abar[timesteps].view(-1, 1, 1, 1)
        clean = images[rows]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        loss = F.mse_loss(model(noisy, timesteps).sample, velocity)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update_ema(ema, model, step, EMA)
        running += loss.item()
        if (step + 1) % 50 == 0:
            print(f"{step + 1}: loss {running / 50:.5f}, {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, model, ema, optimiser, generator, step + 1, time.monotonic() - started)
    model.load_state_dict(ema)
    save_model(model, scheduler)
    record(
        "model",
        parameters=sum(p.numel() for p in model.parameters()),
        iterations=ITERATIONS,
        batch=BATCH,
        seconds=time.monotonic() - started,
    )


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARMUP)
    return LR * warm * 0.5 * (1 + math.cos(math.pi * step / ITERATIONS))


def save_model(model: UNet2DModel, scheduler: DDIMScheduler) -> None:
    """As a diffusers pipeline whose weights are float16: half the size, and loaded as float32."""
    model.half().save_pretrained(ASSETS / "unet")
    scheduler.save_pretrained(ASSETS / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (ASSETS / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


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
    parser.add_argument("--checkpoint", type=Path, default=Path("faces-checkpoint.pt"))
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
