"""Use an exported schedule without its study: score it, on its own model or another, and draw samples with it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import runpy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import StudyConfig, parse_config
from autodiffusion_optuna.errors import AdoptError, ConfigError, ModelError
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.files import first_line
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, cached_denoise
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.solvers import times
from autodiffusion_optuna.export.check import LIMIT, difference, same_weights
from autodiffusion_optuna.export.schedule import FORMAT, Result
from autodiffusion_optuna.export.scripts import PROMPT, diffusers_script, local_folder
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.search.timesteps import BASELINES
from autodiffusion_optuna.study.components import StudyComponents, build


@dataclass(frozen=True, eq=False)
class Opened:
    """A schedule on a model: the parts that score it, and what is compared.

    ``rivals``: uniform with as many steps, then the schedule itself, both with the schedule's solver. ``other``: one
    line of what sets the model apart from the one that the schedule was found on; None where it is that one.
    """

    parts: StudyComponents
    compared: dict[str, Candidate]
    other: str | None = None


def open_result(schedule: Result, overrides: Iterable[str] = (), *, trust: bool = False) -> Opened:
    """Load the model and the score of a schedule; ``overrides`` are ``key=value`` settings, as of a study file.

    ``ConfigError`` where the schedule does not fit the model, or is of a version that did not keep its settings.
    """
    parts = build(schedule_config(schedule, overrides), trust=trust)
    found = schedule.candidate(parts.model.units, parts.model.schedule.T)
    uniform = Candidate(BASELINES["uniform"](parts.model.schedule, found.steps))
    return Opened(parts, {"uniform": uniform, schedule.study: found}, _other_model(schedule, parts.model))


def _other_model(schedule: Result, model: Model) -> str | None:
    found = differences(schedule, model)
    start = f"model {model.name} is not the one that the schedule of study {schedule.study!r} was found on: "
    return start + ", ".join(found) if found else None


def differences(schedule: Result, model: Model) -> list[str]:
    """What a model has otherwise than the one that a schedule was found on; empty where it is the same one."""
    part = schedule.model
    denoiser = model.denoiser if isinstance(model.denoiser, Denoiser) else None
    pairs: list[tuple[str, Any, Any]] = [
        ("kind", part.kind, model.kind),
        ("prediction", part.prediction, denoiser and denoiser.prediction),
        ("clip", part.clip, denoiser and denoiser.clip),
        ("guidance", part.guidance, model.guidance),
        ("shape", part.shape, model.shape),
        ("image shape", part.image_shape, model.picture_shape),
        ("latent scale", part.latent_scale, model.latent_scale),
    ]
    found = [f"{name} {_shown(now)} instead of {_shown(then)}" for name, then, now in pairs if _other(then, now)]
    if schedule.noise is not None and not _same_noise(schedule.noise_schedule(), model.schedule):
        found.append("another noise schedule")
    if part.units is not None and part.units != model.units:
        found.append(f"other layers ({len(model.units)} instead of {len(part.units)})")
    if schedule.conditions != (model.conditions and model.conditions.fingerprint):
        found.append("other labels or prompts")
    if part.weights is not None and model.weights is not None and not same_weights(part.weights, model.weights):
        found.insert(0, "other weights")
    elif part.sha256 != model.fingerprint:
        found.insert(0, "other files, of weights or configs")
    if found and schedule.format < FORMAT:
        found.append("and the schedule, of an older version, does not say all of its own")
    return found


def _other(then: object, now: object) -> bool:
    known = then is not None and now is not None
    if known and isinstance(then, float):
        return not np.isclose(then, float(str(now)), rtol=1e-5)
    return known and then != now


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _same_noise(then: NoiseSchedule, now: NoiseSchedule) -> bool:
    return then.T == now.T and np.allclose(then.lambdas, now.lambdas, atol=1e-6)


def schedule_config(schedule: Result, overrides: Iterable[str] = ()) -> StudyConfig:
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


def score_compared(opened: Opened) -> dict[str, HeldOut]:
    """Values of uniform and of the schedule on the config's held-out banks."""
    score, evaluator = opened.parts.config.score, opened.parts.evaluator
    banks = range(1, score.held_out_banks + 1)
    return {
        name: HeldOut(
            score.held_out_images,
            tuple(evaluator.score(candidate, [score.held_out_images], bank=bank).value for bank in banks),
        )
        for name, candidate in opened.compared.items()
    }


def sample_compared(opened: Opened, images: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """Labelled samples from the same held-out noises, uint8 [images, C, H, W] each: uniform, then the schedule."""
    return [
        (f"{name}, {candidate.steps} steps", opened.parts.evaluator.sample(candidate, 0, images, bank=1).cpu().numpy())
        for name, candidate in opened.compared.items()
    ]


CHECKED = 2
"""Images that an exported script is checked on."""


class ScriptCheck(NamedTuple):
    """What was found of a script for diffusers, None where there is nothing to say.

    ``fault``: why it does not draw the images of the search's sampler. ``other``: see ``Opened``. ``rounding``: how far
    off it is in the study's precision alone.
    """

    fault: str | None
    other: str | None
    rounding: str | None = None


def check_script(schedule: Result) -> ScriptCheck:
    """Compare the images of the script for diffusers with those of the search's sampler.

    It is run as it is exported, on its model and on ``CHECKED`` images; the pixels of each may differ by
    ``check.LIMIT`` of 255 in the mean. Where they do in reduced precision, float32 decides: a pipeline rounds its
    states too. ``AdoptError`` where the model is not here or too large. Nothing is downloaded.
    """
    schedule = _at_hand(schedule)
    off, other = _compared(schedule)
    if isinstance(off, str):
        return ScriptCheck(off, other)
    if off <= LIMIT:
        return ScriptCheck(None, other)
    told = f"on this model diffusers' images differ from those of the search's sampler by {off:.3g} of 255"
    precision = schedule.model.precision
    if precision == "float32":
        return ScriptCheck(told, other)
    try:
        plain, _ = _compared(_in_float32(schedule))
    except ModelError as error:
        return ScriptCheck(None, other, f"{told} in {precision}; they were not compared in float32: {error}")
    if isinstance(plain, str) or plain > LIMIT:
        return ScriptCheck(told, other)
    return ScriptCheck(None, other, f"{told} in {precision}, and by {plain:.2g} in float32")


def _in_float32(schedule: Result) -> Result:
    assert schedule.config is not None, "exported from a study"
    model = schedule.config.model.model_copy(update={"precision": "float32"})
    return schedule.model_copy(
        update={
            "model": schedule.model.model_copy(update={"precision": "float32"}),
            "config": schedule.config.model_copy(update={"model": model}),
        }
    )


def _compared(schedule: Result) -> tuple[float | str, str | None]:
    """Difference of the script's images from ours, of 255, or why it draws none; and what sets the model apart."""
    wanted, other = _ours(schedule)
    found = _theirs(schedule)
    return found if isinstance(found, str) else difference(found / 127.5 - 1, wanted.float() / 127.5 - 1), other


def _theirs(schedule: Result) -> torch.Tensor | str:
    """What the script draws, float32 [CHECKED, C, H, W] in [0, 255], or why it draws nothing."""
    with TemporaryDirectory() as place:
        script = Path(place) / f"{schedule.study}.py"
        schedule.write(script.with_suffix(".json"))
        script.write_text(diffusers_script(schedule, images=CHECKED), encoding="utf-8")
        try:
            return _run(script)
        except AdoptError as error:
            return str(error).partition(";")[0]
        except (torch.OutOfMemoryError, MemoryError, ImportError) as error:
            raise _not_run(error) from error
        except Exception as error:  # whatever diffusers makes of the model
            return f"diffusers cannot draw with this model as it is here ({type(error).__name__}: {first_line(error)})"


def _at_hand(schedule: Result) -> Result:
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


def _ours(schedule: Result) -> tuple[torch.Tensor, str | None]:
    """Images of the search's sampler, and what sets the model apart, which is let go of before the script loads it.

    ``ModelError`` where the memory is too small.
    """
    try:
        model = _open_for_check(schedule)
        conditions = model.conditions and model.conditions.fingerprint  # the prompt of a script is its own
        other = _other_model(schedule.model_copy(update={"conditions": conditions}), model)
        return _drawn(schedule, model), other
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _not_run(error) from error


def _not_run(error: BaseException) -> ModelError:
    return ModelError(f"it cannot be run here ({type(error).__name__}: {first_line(error)})")


def _open_for_check(schedule: Result) -> Model:
    """The model as the study opens it, but with the prompt of the script."""
    with TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.txt"
        prompts.write_text(f"{PROMPT}\n" * CHECKED, encoding="utf-8")
        model_config = schedule.config and schedule.config.model
        prompted = [f"model.prompts={json.dumps(str(prompts))}"] if model_config and model_config.prompts else []
        return load_model(schedule_config(schedule, [*prompted, "model.compile=false"]).model)


def _drawn(schedule: Result, model: Model) -> torch.Tensor:
    """uint8 [CHECKED, C, H, W] of the search's sampler, from the noise that the script draws."""
    candidate = schedule.candidate(model.units, T=model.schedule.T)
    sampling = Sampling(**schedule.sampling_settings())
    generator = torch.Generator().manual_seed(0)

    def noise(step: int) -> torch.Tensor:
        return torch.randn(CHECKED, *model.shape, generator=generator).to(model.device)

    x = noise(0)
    chosen = [i % model.conditions.count for i in range(CHECKED)] if model.conditions else []
    denoise = cached_denoise(model.bind(chosen, sampling.guidance), candidate, None, (), NfeCounter())
    nodes = times(model.schedule, candidate.timesteps, sampling.final)
    return model.to_images(sampling.find_solver(noise)(denoise, x, nodes)).cpu()


def _run(script: Path) -> torch.Tensor:
    """float32 [B, C, H, W] in [0, 255] that a script draws; what it and its libraries say is not shown."""
    quiet = io.StringIO()
    with contextlib.ExitStack() as silence:
        silence.enter_context(contextlib.redirect_stdout(quiet))
        silence.enter_context(contextlib.redirect_stderr(quiet))
        silence.enter_context(warnings.catch_warnings(action="ignore"))
        for library in map(logging.getLogger, ("diffusers", "transformers")):
            silence.callback(library.setLevel, library.level)
            library.setLevel(logging.CRITICAL)
        images = runpy.run_path(str(script))["images"]
    if isinstance(images, torch.Tensor):
        return images.float()
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float()
