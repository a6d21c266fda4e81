"""What the check of a model at load tells apart: right and wrong settings of a digits model and of an ADM.

    python benchmarks/sanity.py train --data faces.npz --adm adm.pt      # 40 minutes on one core
    python benchmarks/sanity.py table --data faces.npz --adm adm.pt      # two minutes

``faces.npz`` holds ``x`` uint8 [12000, 32, 32, 3]. The ADM is a small one with attention, trained on them at 16 x 16;
its checkpoint has guided-diffusion's layout and the new order of attention. Images are held-out ones of both data sets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import record
from torch import Tensor, nn

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.models.adm import adm_layers, build_unet
from autodiffusion_optuna.evaluation.models.adm_fields import AdmFields
from autodiffusion_optuna.evaluation.sanity import LEVELS, doubt, measure, own_samples
from autodiffusion_optuna.noise import cosine, from_scheduler_config, linear

DIGITS = Path(__file__).parent.parent / "tests" / "data" / "digits_heldout.npz"
SEED = 0
HELD_OUT = 500
ITERATIONS, BATCH, LR, EMA, WARMUP = 4000, 64, 1e-3, 0.998, 100
FIELDS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16,8",
    "num_head_channels": 16,
    "use_new_attention_order": True,
}


def load_faces(path: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out faces, uint8 [N, 3, 16, 16]: the mean of each 2 x 2 square."""
    with np.load(path, allow_pickle=False) as data:
        images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2)
    images = F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    return images[HELD_OUT:], images[:HELD_OUT]


def train(data: Path, out: Path) -> None:
    torch.manual_seed(SEED)
    images = load_faces(data)[0].float() / 127.5 - 1
    fields, schedule = AdmFields(**FIELDS), linear(1000)
    network = build_unet(fields)
    ema = {name: value.clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.0)
    warm_cosine = lambda i: min(1, (i + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * i / ITERATIONS))  # noqa: E731
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, warm_cosine)
    alphas, sigmas = (torch.from_numpy(level).float().view(-1, 1, 1, 1) for level in (schedule.alphas, schedule.sigmas))
    generator = torch.Generator().manual_seed(SEED)
    started, total = time.monotonic(), 0.0
    for i in range(ITERATIONS):
        x0 = images[torch.randint(len(images), (BATCH,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * 1000).long()
        loss = F.mse_loss(network(alphas[t] * x0 + sigmas[t] * noise, t).sample, noise)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        rate.step()
        decay = min(EMA, (1 + i) / (10 + i))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        total += loss.item()
        if (i + 1) % 100 == 0:
            print(f"{i + 1}: loss {total / 100:.4f}, {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
            torch.save(guided_diffusion(ema, fields), out)


def guided_diffusion(state: dict[str, Tensor], fields: AdmFields) -> dict[str, Tensor]:
    """The weights of a UNet2DModel as guided-diffusion saves them, with the new order of attention."""
    weights = {}
    for source, targets in adm_layers(fields):
        for part in ("weight", "bias"):
            if f"{targets[0]}.{part}" in state:
                value = torch.cat([state[f"{target}.{part}"] for target in targets])
                flat = part == "weight" and source.endswith((".qkv", ".proj_out"))  # a convolution over positions
                weights[f"{source}.{part}"] = value[..., None] if flat else value
    return weights


def network_of(model: Model) -> nn.Module:
    """The UNet behind a model's denoiser."""
    cells = model.denoiser.network.__closure__
    return next(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, nn.Module))


def rebuilt(model: Model, **changes: Any) -> Model:
    """The model with another prediction or schedule."""
    denoiser = replace(model.denoiser, **changes)
    return replace(model, denoiser=denoiser, schedule=denoiser.schedule)


def reweighted(model: Model, change: Callable[[Tensor], Tensor]) -> Model:
    """The model with all its matrices and kernels changed."""
    for parameter in network_of(model).parameters():
        if parameter.ndim > 1:
            parameter.copy_(change(parameter))
    return model


def reordered(model: Model) -> Model:
    """The model with queries, keys and values taken from the joint projection in the other order."""
    for module in network_of(model).modules():
        if type(module).__name__ == "Attention":
            for part in ("weight", "bias"):
                layers = [getattr(layer, part) for layer in (module.to_q, module.to_k, module.to_v)]
                joint = torch.cat(list(layers))
                for layer, piece in zip(layers, joint.reshape(module.heads, 3, -1).unbind(1), strict=True):
                    layer.copy_(piece.reshape(layer.shape))
    return model


def shuffled(values: Tensor) -> Tensor:
    return values.flatten()[torch.randperm(values.numel())].reshape(values.shape)


STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
CHANGES: dict[str, Callable[[Model], Model]] = {
    "right": lambda model: model,
    "prediction: sample": lambda model: rebuilt(model, prediction="sample"),
    "prediction: v": lambda model: rebuilt(model, prediction="v_prediction"),
    "prediction: flow": lambda model: rebuilt(model, prediction="flow_prediction"),
    "betas: cosine": lambda model: rebuilt(model, schedule=cosine(1000)),
    "betas: scaled linear, Stable Diffusion's": lambda model: rebuilt(model, schedule=from_scheduler_config(STABLE)),
    "betas: linear to 0.015 instead of 0.02": lambda model: rebuilt(model, schedule=linear(1000, 1e-4, 0.015)),
    "betas: linear to 0.03 instead of 0.02": lambda model: rebuilt(model, schedule=linear(1000, 1e-4, 0.03)),
    "weights halved": lambda model: reweighted(model, lambda values: values / 2),
    "weights doubled": lambda model: reweighted(model, lambda values: values * 2),
    "weights rounded to fp8 e4m3": lambda model: reweighted(model, lambda w: w.to(torch.float8_e4m3fn).float()),
    "random: weights shuffled": lambda model: reweighted(model, shuffled),
}


def adm(path: Path, **fields: Any) -> Model:
    return load_model(ModelConfig(source=f"adm:{path}", device="cpu", fields={**FIELDS, **fields}))


def table(data: Path, path: Path) -> None:
    torch.manual_seed(SEED)
    faces = load_faces(data)[1]
    with np.load(DIGITS, allow_pickle=False) as stored:
        digits = torch.from_numpy(stored["x"]).unsqueeze(1)
    models: dict[str, tuple[Any, ...]] = {}
    for name, change in CHANGES.items():
        models[f"digits, {name}"] = change(load_model(ModelConfig(source="digits", device="cpu"))), digits
        models[f"ADM, {name}"] = change(adm(path)), faces
    for kind, (model, images) in {"digits": models["digits, right"], "ADM": models["ADM, right"]}.items():
        for word, factor in (("doubled", 2.0), ("halved", 0.5)):  # as by a wrong scaling_factor of latents
            models[f"{kind}, states {word}"] = rebuilt(model, clip=False), images, factor
    models["digits, attention: other order"] = reordered(load_model(ModelConfig(source="digits", device="cpu"))), digits
    models["ADM, attention: other order"] = adm(path, use_new_attention_order=False), faces
    models["ADM, attention: heads of 32 channels instead of 16"] = adm(path, num_head_channels=32), faces
    rows = {}
    for name, (model, images, *factor) in models.items():
        states = (images.float() / 127.5 - 1) * next(iter(factor), 1.0)
        rows[name] = {"images": row(model, states[:16]), "own samples": row(model, own_samples(model, 64))}
        print(f"{name:52}", *rows[name].values(), flush=True)
    sets = {}
    for kind in ("digits", "ADM"):
        model, images = models[f"{kind}, right"]
        states = images.float() / 127.5 - 1
        for size in (4, 16):
            found = [level for part in states[: 20 * size].split(size) for level in measure(model, part, 64)]
            worst = {"largest ratio": max(level.ratio for level in found), "least kept": min(one.kept for one in found)}
            sets[f"{kind}, right, 20 sets of {size} images"] = {key: round(value, 3) for key, value in worst.items()}
    result = {
        "signal to noise": LEVELS,
        "seed": SEED,
        "images": 16,
        "adm": {"iterations": ITERATIONS, "batch": BATCH, **FIELDS},
        "rows": rows,
        "false alarms": sets,
    }
    print(sets, record("sanity", result))


def row(model: Model, states: Tensor) -> dict[str, Any]:
    """Errors over a linear filter's, shares that rescaling leaves, and what the check makes of them."""
    levels = measure(model, states, 64)
    ratios = [round(level.ratio, 3) for level in levels]
    return {"ratio": ratios, "kept": [round(level.kept, 3) for level in levels], "warned": doubt(levels) is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train", "table"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adm", type=Path, default=Path("adm.pt"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"train": train, "table": table}[arguments.part](arguments.data, arguments.adm)


if __name__ == "__main__":
    main()
