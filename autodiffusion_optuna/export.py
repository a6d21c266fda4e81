"""Take a result out of a study: a JSON schedule, and Python that applies it to a diffusers model. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from autodiffusion_optuna import __version__, records
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import StudyConfig
from autodiffusion_optuna.errors import ConfigError, StudyError
from autodiffusion_optuna.report import read_report

FORMAT = 1
BUNDLED = ("digits",)


def export_schedule(study: optuna.Study) -> dict[str, Any]:
    """Everything needed to repeat the best candidate's images: model, solver, timesteps, skipped units by name."""
    report = read_report(study)
    if report.best is None:
        raise StudyError(f"study {report.config.name!r} has no finished trial to export; run it first")
    config, best, attrs = report.config, report.best, study.user_attrs
    return {
        "format": FORMAT,
        "study": config.name,
        "model": {"source": config.model.source, "sha256": attrs["model"], "clip": config.model.clip},
        "solver": {"name": config.sampling.solver, "final": config.sampling.final},
        "train_timesteps": attrs["codec"]["T"],
        "timesteps": list(best.candidate.timesteps),
        "skips": best.candidate.skip_names(report.units),
        "cost": best.cost,
        "score": {
            "metric": report.metric,
            "value": best.value,
            "images": config.score.images,
            "fresh": None if best.fresh is None else best.fresh.summary(),
        },
        "made_with": {
            "autodiffusion_optuna": attrs.get(records.VERSION, __version__),
            "optuna": optuna.__version__,
        },
    }


def load_schedule(path: Path, units: tuple[str, ...]) -> Candidate:
    """Candidate of an exported JSON schedule for a model with the given unit names (ConfigError)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        position = {name: index for index, name in enumerate(units)}
        skips = [[position[name] for name in names] for names in data["skips"]]
        return Candidate.from_json({"timesteps": data["timesteps"], "skips": skips})
    except OSError as error:
        raise ConfigError(f"cannot read schedule {str(path)!r}: {error.strerror}") from None
    except KeyError as error:
        raise ConfigError(f"schedule {path.name}: the model has no unit, or the file no key, named {error}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"schedule {path.name} is not one that adopt export wrote: {error}") from None


def export_python(study: optuna.Study) -> str:
    """A script that samples with the best candidate: plain diffusers where it has the solver, else this package.

    Raises ConfigError for a model that diffusers cannot load.
    """
    schedule, report = export_schedule(study), read_report(study)
    assert report.best is not None
    config = report.config
    source = config.model.source
    if source == "mixture":
        raise ConfigError("the analytic mixture is not a diffusers model; export it with --format json")
    writer = _SCHEDULERS.get(config.sampling.solver)
    scheduler = writer(config, len(schedule["timesteps"])) if writer else None
    if scheduler is None:
        return _package_script(schedule, config, report.best.candidate)
    return _diffusers_script(schedule, config, scheduler)


def _dpm_solver(order: int) -> Callable[[StudyConfig, int], tuple[str, dict[str, Any]] | None]:
    def write(config: StudyConfig, steps: int) -> tuple[str, dict[str, Any]] | None:
        return "DPMSolverMultistepScheduler", {
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "solver_order": order,  # order 1 is DDIM, exactly, on any list of timesteps
            "final_sigmas_type": "zero" if config.sampling.final == "one" else "sigma_min",
            "lower_order_final": steps < 10,
            "euler_at_final": False,
            "thresholding": config.model.clip,  # with a ratio and maximum of 1: a plain clip to [-1, 1]
            "dynamic_thresholding_ratio": 1.0,
            "sample_max_value": 1.0,
            "use_karras_sigmas": False,
        }

    return write


def _heun(config: StudyConfig, steps: int) -> tuple[str, dict[str, Any]] | None:
    if config.sampling.final != "one":
        return None  # diffusers' Heun always ends without noise
    return "HeunDiscreteScheduler", {
        "timestep_spacing": "leading",
        "clip_sample": config.model.clip,
        "clip_sample_range": 1.0,
        "use_karras_sigmas": False,
    }


_SCHEDULERS: dict[str, Callable[[StudyConfig, int], tuple[str, dict[str, Any]] | None]] = {
    "ddim": _dpm_solver(1),
    "dpmpp_2m": _dpm_solver(2),
    "heun": _heun,
}
"""Solver -> diffusers scheduler class and options that take its steps on an uneven list."""


def _head(schedule: dict[str, Any], config: StudyConfig) -> str:
    fresh = schedule["score"]["fresh"]
    scored = (
        f"{fresh['mean']:.4g} on {fresh['banks']} x {fresh['images']} fresh images"
        if fresh
        else f"{schedule['score']['value']:.4g} on the search's {schedule['score']['images']} images"
    )
    solver = f"{config.sampling.solver}, {len(schedule['timesteps'])} steps"
    return f'"""Schedule found by adopt, study {config.name}: {solver}, {schedule["score"]["metric"]} {scored}."""\n'


def _model_line(source: str) -> tuple[str, str]:
    if source in BUNDLED:
        return "from importlib.resources import files\n\n", (
            f'str(files("autodiffusion_optuna") / "assets" / "{source}")'
        )
    return "", repr(source)


def _subfolder(source: str, name: str) -> str:
    """The loader's subfolder argument: pipelines keep their parts in folders, a bare model does not."""
    return f', subfolder="{name}"' if source in BUNDLED or (Path(source) / name).is_dir() else ""


def _diffusers_script(schedule: dict[str, Any], config: StudyConfig, scheduler: tuple[str, dict[str, Any]]) -> str:
    source = config.model.source
    imports, model = _model_line(source)
    name, options = scheduler
    arguments = "".join(f"    {key}={value!r},\n" for key, value in options.items())
    masked = any(schedule["skips"])
    skip_import = "\nfrom autodiffusion_optuna.evaluation.skip import find_units, skipping\n" if masked else ""
    skip_setup = f"SKIPS = {schedule['skips']}  # by step\n" if masked else ""
    return (
        _head(schedule, config)
        + imports
        + f"import torch\nfrom diffusers import {name}, UNet2DModel\n"
        + skip_import
        + f"\nMODEL = {model}\nTIMESTEPS = {schedule['timesteps']}\n"
        + skip_setup
        + f"\nunet = UNet2DModel.from_pretrained(MODEL{_subfolder(source, 'unet')}).eval()\n"
        + f"scheduler = {name}.from_pretrained(\n    MODEL{_subfolder(source, 'scheduler')},\n{arguments})\n"
        + "scheduler.set_timesteps(timesteps=TIMESTEPS)\n"
        + _loop(name, masked)
    )


def _loop(scheduler: str, masked: bool) -> str:
    scale = "scheduler.scale_model_input(x, t)" if scheduler == "HeunDiscreteScheduler" else "x"
    start = " * scheduler.init_noise_sigma" if scheduler == "HeunDiscreteScheduler" else ""
    call = f"unet({scale}, t).sample"
    if masked:
        setup = (
            "\nunits = find_units(unet, lambda: unet(torch.zeros(1, *SHAPE), 0))\n"
            "bit = {name: 1 << u for u, name in enumerate(units.names)}\n"
            "masks = {t: sum(bit[name] for name in names) for t, names in zip(TIMESTEPS, SKIPS)}\n"
        )
        body = f"        with skipping(units, masks[int(t)]):\n            output = {call}\n"
    else:
        setup, body = "", f"        output = {call}\n"
    return (
        "SHAPE = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)\n"
        + setup
        + "\ngenerator = torch.Generator().manual_seed(0)\n"
        + f"x = torch.randn(16, *SHAPE, generator=generator){start}\n"
        + "with torch.inference_mode():\n    for t in scheduler.timesteps:\n"
        + body
        + "        x = scheduler.step(output, t, x).prev_sample\n"
        + "images = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)  # [16, C, H, W]\n"
    )


def _package_script(schedule: dict[str, Any], config: StudyConfig, best: Candidate) -> str:
    """For solvers that diffusers has no scheduler for on uneven lists."""
    return (
        _head(schedule, config)
        + "import torch\n\n"
        + "from autodiffusion_optuna import Candidate\n"
        + "from autodiffusion_optuna.evaluation.models import load_model\n"
        + "from autodiffusion_optuna.evaluation.prefix import Tally, remembering\n"
        + "from autodiffusion_optuna.evaluation.solvers import SOLVERS, times\n"
        + f"\nmodel = load_model({config.model.source!r}, clip={config.model.clip!r})\n"
        + f"candidate = Candidate.from_key({best.key!r})\n"
        + f"nodes = times(model.schedule, candidate.timesteps, {config.sampling.final!r})\n"
        + "denoise = remembering(model.denoiser, candidate, None, (), Tally())\n"
        + "x = torch.randn(16, *model.shape, generator=torch.Generator().manual_seed(0))\n"
        + f"images = model.to_images(SOLVERS[{config.sampling.solver!r}](denoise, x, nodes))  # uint8 [16, C, H, W]\n"
    )
