"""Images a second of the evaluator over a bare loop, for a network of ADM's size on a GPU.

    python benchmarks/gpu_adm.py            # needs a CUDA device; writes benchmarks/results/gpu_adm.json
    python benchmarks/gpu_adm.py --small    # a small network on the CPU: tries the script, writes nothing

A class-conditional UNet2DModel of ADM ImageNet-64's shape (296 M random weights) in bfloat16, four DDIM steps, 1,000
images, features of a random network of Inception's shape through the Inception extractor. The bare loop makes the same
network calls and extracts the same features, and does nothing else. Both are timed in turns, and medians compared.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import record
from diffusers import DDIMScheduler
from torch import Tensor, nn

from autodiffusion_optuna import Candidate
from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import Extractor, load_extractor
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.models.adm import build_unet
from autodiffusion_optuna.evaluation.models.adm_fields import PRESETS
from autodiffusion_optuna.evaluation.references.reference import build_reference
from autodiffusion_optuna.evaluation.sampling import Sampling

CANDIDATE = Candidate((900, 650, 400, 150))
ROUNDS = 3


def write_network(folder: Path, small: bool) -> int:
    """A diffusers folder of random weights; how many there are."""
    torch.manual_seed(0)
    adm = PRESETS["imagenet64"]
    if small:
        adm = replace(adm, num_channels=32, num_res_blocks=1, channel_mult="1,1,1,1", num_head_channels=32)
    network = build_unet(adm)
    network.save_pretrained(folder)
    DDIMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder)
    return sum(parameter.numel() for parameter in network.parameters())


class InceptionShape(nn.Module):
    """The interface of NVIDIA's TorchScript file around torchvision's architecture with random weights."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import inception_v3

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layers = inception_v3(weights=None, init_weights=False, aux_logits=False, transform_input=False)
        layers.fc = nn.Identity()
        self.layers = torch.jit.trace(layers.eval(), torch.zeros(2, 3, 299, 299))

    def forward(self, x: Tensor, return_features: bool = True) -> Tensor:
        features: Tensor = self.layers((x - 128) / 128)
        return features


def inception(folder: Path, device: torch.device) -> Extractor:
    torch.manual_seed(1)
    path = folder / "inception.pt"
    torch.jit.script(InceptionShape()).save(str(path))
    return load_extractor("inception", device, weights=path, trust=True)


def bare(model: Model, extractor: Extractor, images: int, batch: int) -> float:
    """Seconds of the same network calls and features with nothing around them."""
    synchronize(model.device)
    started = time.perf_counter()
    for first in range(0, images, batch):
        size = min(batch, images - first)
        x = torch.randn(size, *model.shape, device=model.device)
        denoise = model.bind([0] * size)
        for t in CANDIDATE.timesteps:
            x0 = denoise(x, t, 0)
        extractor(model.to_images(x0))
    synchronize(model.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(folder: Path, device: str, images: int, batch: int, small: bool) -> dict[str, Any]:
    weights = write_network(folder, small)
    model = load_model(ModelConfig(source=str(folder), device=device, precision="bfloat16"))
    extractor = inception(folder, model.device)
    noise = torch.randint(0, 256, (64, *model.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    reference = build_reference(noise.to(model.device), extractor, "noise")
    evaluator = Evaluator(model, Sampling(), extractor, reference, batch=batch)
    evaluator.score(CANDIDATE, [batch])
    bare(model, extractor, batch, batch)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    walls, plain, phases = [], [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        score = evaluator.score(CANDIDATE, [images])
        walls.append(time.perf_counter() - started)
        phases.append(vars(score.seconds))
        plain.append(bare(model, extractor, images, batch))
    return {
        "weights": weights,
        "images": images,
        "batch": batch,
        "images a second": images / statistics.median(walls),
        "speed over the bare loop": statistics.median(b / w for b, w in zip(plain, walls, strict=True)),
        "seconds by phase": {name: statistics.median(phase[name] for phase in phases) for name in phases[0]},
        "peak GPU memory, MiB": torch.cuda.max_memory_allocated() / 2**20 if model.device.type == "cuda" else None,
    }


def main() -> None:
    small = "--small" in sys.argv
    if not small and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_adm.py needs a CUDA device, and torch finds none; --small tries it on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        if small:
            print(json.dumps(measure(Path(folder), "cpu", 4, 2, small), indent=2))
        else:
            result = measure(Path(folder), "cuda", 1000, 250, small)
            print(json.dumps(result, indent=2), record("gpu_adm", result))


if __name__ == "__main__":
    main()
