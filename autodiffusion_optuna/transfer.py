"""Use an exported schedule without its study: score it, on its own model or another, and draw samples with it."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.check import LIMIT, difference
from autodiffusion_optuna.config import StudyConfig, parse_config
from autodiffusion_optuna.errors import AdoptError, ConfigError
from autodiffusion_optuna.evaluation.prefix import Tally, remembering
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.solvers import times
from autodiffusion_optuna.export import PROMPT, diffusers_script, local_folder
from autodiffusion_optuna.records import Fresh
from autodiffusion_optuna.schedule import Schedule
from autodiffusion_optuna.search.schedules import KNOWN
from autodiffusion_optuna.study import Parts, build, open_model


@dataclass(frozen=True, eq=False)
class Opened:
    """A schedule on a model: the parts that score it, and what is compared.

    ``rivals``: uniform with as many steps, then the schedule itself, both with the schedule's solver.
    """

    parts: Parts
    rivals: dict[str, Candidate]


def open_schedule(schedule: Schedule, overrides: Iterable[str] = (), *, trust: bool = False) -> Opened:
    """Load the model and the score of a schedule; ``overrides`` are ``key=value`` settings, as of a study file.

    ``ConfigError`` where the schedule does not fit the model, or is of a version that did not keep its settings.
    """
    parts = build(schedule_config(schedule, overrides), trust=trust)
    found = schedule.candidate(parts.model.units, parts.model.schedule.T)
    uniform = Candidate(KNOWN["uniform"](parts.model.schedule, found.steps))
    return Opened(parts, {"uniform": uniform, schedule.study: found})


def schedule_config(schedule: Schedule, overrides: Iterable[str] = ()) -> StudyConfig:
    """A study of one candidate that makes and scores images as the schedule says."""
    if schedule.config is None:
        raise ConfigError(
            f"the schedule of study {schedule.study!r} is of an older version and does not say how its images were "
            f"made; go on with adopt run --study {schedule.study} and export it again"
        )
    sampling: dict[str, Any] = {
        "solver": schedule.solver,
        "steps": len(schedule.timesteps),
        "final": schedule.final,
        "guidance": schedule.guidance,
        "eta": schedule.eta,
        "amplification_cap": schedule.amplification_cap,
    }
    table = {
        "name": schedule.study,
        "model": schedule.config.model.model_dump(mode="json"),
        "sampling": {key: value for key, value in sampling.items() if value is not None},
        "search": {"trials": 1, "warm_starts": ["uniform"]},
        "score": schedule.config.score.model_dump(mode="json"),
    }
    return parse_config(table, overrides)


def score_rivals(opened: Opened) -> dict[str, Fresh]:
    """Values of uniform and of the schedule on the config's fresh banks."""
    score, evaluator = opened.parts.config.score, opened.parts.evaluator
    banks = range(1, score.fresh_banks + 1)
    return {
        name: Fresh(
            score.fresh_images,
            tuple(evaluator.score(candidate, [score.fresh_images], bank=bank).value for bank in banks),
        )
        for name, candidate in opened.rivals.items()
    }


def sample_rivals(opened: Opened, images: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """Labelled samples from the same fresh noises, uint8 [images, C, H, W] each: uniform, then the schedule."""
    return [
        (f"{name}, {candidate.steps} steps", opened.parts.evaluator.sample(candidate, 0, images, bank=1).cpu().numpy())
        for name, candidate in opened.rivals.items()
    ]


CHECKED = 2
"""Images that an exported script is checked on."""


def script_fault(schedule: Schedule) -> str | None:
    """Why the script for diffusers does not draw the images of the search's sampler; None where it does.

    It is run as it is exported, on its model and on ``CHECKED`` images; their pixels may differ by ``check.LIMIT`` of
    255 in the mean. ``AdoptError`` where that cannot be found out, as the model is not here. Nothing is downloaded.
    """
    schedule = _at_hand(schedule)
    wanted = _drawn(schedule)
    with TemporaryDirectory() as place:
        script = Path(place) / f"{schedule.study}.py"
        schedule.write(script.with_suffix(".json"))
        script.write_text(diffusers_script(schedule, images=CHECKED), encoding="utf-8")
        try:
            found = _run(script)
        except AdoptError as error:
            return str(error).partition(";")[0]
        except Exception as error:  # whatever diffusers makes of the model
            line = next(iter(str(error).splitlines()), "")[:200]
            return f"diffusers cannot draw with this model as it is here ({type(error).__name__}: {line})"
    off = difference(found / 127.5 - 1, wanted / 127.5 - 1)
    if off <= LIMIT:
        return None
    return f"on this model diffusers' images differ from those of the search's sampler by {off:.3g} of 255"


def _at_hand(schedule: Schedule) -> Schedule:
    """The schedule with the model's local folder in place of a hub id (ModelError where it is not in the cache)."""
    assert schedule.config is not None, "exported from a study"
    folder = local_folder(schedule.model.source)
    if folder is None:
        return schedule
    model = schedule.config.model.model_copy(update={"source": str(folder)})
    return schedule.model_copy(
        update={
            "model": schedule.model.model_copy(update={"source": str(folder)}),
            "config": schedule.config.model_copy(update={"model": model}),
        }
    )


def _drawn(schedule: Schedule) -> torch.Tensor:
    """float32 [CHECKED, C, H, W] in [0, 255] of the search's sampler, from the noise that the script draws."""
    with TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.txt"
        prompts.write_text(f"{PROMPT}\n" * CHECKED, encoding="utf-8")
        model_config = schedule.config and schedule.config.model
        prompted = [f"model.prompts={json.dumps(str(prompts))}"] if model_config and model_config.prompts else []
        model = open_model(schedule_config(schedule, [*prompted, "model.compile=false"]))
    candidate = schedule.candidate(model.units, T=model.schedule.T)
    sampling = Sampling(**schedule.sampling_settings())
    generator = torch.Generator().manual_seed(0)

    def noise(step: int) -> torch.Tensor:
        return torch.randn(CHECKED, *model.shape, generator=generator).to(model.device)

    x = noise(0)
    chosen = [i % model.conditions.count for i in range(CHECKED)] if model.conditions else []
    denoise = remembering(model.bind(chosen, sampling.guidance), candidate, None, (), Tally())
    nodes = times(model.schedule, candidate.timesteps, sampling.final)
    return model.to_images(sampling.find_solver(noise)(denoise, x, nodes)).cpu().float()


def _run(script: Path) -> torch.Tensor:
    """float32 [B, C, H, W] in [0, 255] that a script draws; what it and its libraries say is not shown."""
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings(action="ignore"):
        images = runpy.run_path(str(script))["images"]
    if isinstance(images, torch.Tensor):
        return images.float()
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float()
