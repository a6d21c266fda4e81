"""An exported script, run as printed, draws the images of our own sampler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Adopt
from diffusers import DDIMScheduler, UNet2DModel

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.evaluation.prefix import Tally, remembering
from autodiffusion_optuna.evaluation.solvers import SOLVERS, times
from autodiffusion_optuna.export import load_schedule


@pytest.fixture(params=["flat", "pipeline"])
def model_folder(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small real model in both layouts that diffusers writes."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    parts = ("unet", "scheduler") if request.param == "pipeline" else ("", "")
    network.save_pretrained(folder / "net" / parts[0])
    DDIMScheduler(num_train_timesteps=100).save_pretrained(folder / "net" / parts[1])
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    return folder / "net"


def searched(adopt: Adopt, *settings: str) -> dict[str, Any]:
    """Search six trials on the small model and export: the JSON schedule; ``exported/mine.py`` lies beside it."""
    given = ["name=mine", "model.source=net", "score.reference=images.npz", "search.trials=9", *settings]
    arguments = [argument for setting in given for argument in ("--set", setting)]
    ran = adopt("run", "--study", "quick.toml", *arguments)
    assert ran.code == 0, ran
    Path("exported").mkdir()
    assert adopt("export", "--study", "mine", "--out", "exported").code == 0
    schedule: dict[str, Any] = json.loads(Path("exported/mine.json").read_text())
    return schedule


def ours(candidate: Candidate, solver: str, final: str, clip: bool) -> torch.Tensor:
    """Images of our own sampler from the noise that the exported scripts draw."""
    model = load_model("net", clip=clip)
    noise = torch.randn(16, *model.shape, generator=torch.Generator().manual_seed(0))
    nodes = times(model.schedule, candidate.timesteps, final)  # type: ignore[arg-type]
    denoise = remembering(model.denoiser, candidate, None, (), Tally())
    return model.to_images(SOLVERS[solver](denoise, noise, nodes))


@pytest.mark.parametrize(
    ("solver", "final", "clip", "masked"),
    [
        ("ddim", "one", True, False),
        ("ddim", "first", False, False),
        ("ddim", "one", True, True),
        ("dpmpp_2m", "one", False, False),
        ("dpmpp_2m", "first", True, True),
        ("heun", "one", True, False),
        ("heun", "first", True, False),
        ("plms", "one", True, True),
    ],
)
def test_the_script_draws_our_images(
    model_folder: Path, adopt: Adopt, solver: str, final: str, clip: bool, masked: bool
) -> None:
    settings = [f"sampling.solver={solver}", f"sampling.final={final}", f"model.clip={str(clip).lower()}"]
    if masked:  # a budget below three full steps, so that the best candidate must skip something
        settings += ["search.max_skip=0.6", "search.max_cost=0.9", "search.trials=14"]
    schedule = searched(adopt, *settings)
    assert any(schedule["skips"]) == masked
    units = load_model("net").units
    candidate = load_schedule(Path("exported/mine.json"), units)
    assert candidate.timesteps == tuple(schedule["timesteps"])
    assert candidate.skip_names(units) == schedule["skips"]
    names: dict[str, Any] = {}
    exec(compile(Path("exported/mine.py").read_text(), "mine.py", "exec"), names)
    difference = names["images"].int() - ours(candidate, solver, final, clip).int()
    assert int(difference.abs().max()) <= 2


def test_a_damaged_schedule_is_refused_in_one_line(folder: Path) -> None:
    path = folder / "schedule.json"
    with pytest.raises(ConfigError, match="No such file"):
        load_schedule(path, ())
    path.write_text("{")
    with pytest.raises(ConfigError, match="not one that adopt export wrote"):
        load_schedule(path, ())
    path.write_text('{"timesteps": [5, 2], "skips": [["down.0"], []]}')
    with pytest.raises(ConfigError, match=r"down\.0"):
        load_schedule(path, ("up.0",))
