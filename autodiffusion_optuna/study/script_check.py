"""Does an exported script draw the images of the search's sampler? Both are run on the result's own model."""

from __future__ import annotations

import contextlib
import io
import logging
import runpy
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from autodiffusion_optuna.errors import AdoptError, ModelError, first_line
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.evaluation.models.hub import is_complete
from autodiffusion_optuna.export.check import LIMIT, difference
from autodiffusion_optuna.export.draw import draw
from autodiffusion_optuna.export.result import Result
from autodiffusion_optuna.export.scripts import PROMPT, cached_file, diffusers_script
from autodiffusion_optuna.study.transfer import other_model

CHECKED = 2
"""Images that an exported script is checked on."""
NOT_HERE = (torch.OutOfMemoryError, MemoryError, ImportError)
"""Errors of a script or a model that may well run on another machine."""


class ScriptCheck(NamedTuple):
    """What was found of a script for diffusers, None where there is nothing to say.

    ``fault``: why it does not draw the images of the search's sampler. ``other``: see ``transfer.other_model``.
    ``rounding``: how far off it is in the study's precision alone.
    """

    fault: str | None
    other: str | None
    rounding: str | None = None


def check_script(result: Result) -> ScriptCheck:
    """Compare the images of the script for diffusers with those of the search's sampler.

    It is run as it is exported, on its model and on ``CHECKED`` images; the pixels of each may differ by
    ``check.LIMIT`` of 255 in the mean. Where they do in reduced precision, float32 decides: a pipeline rounds its
    states too. ``AdoptError`` where the model is not here or too large. Nothing is downloaded.
    """
    folder = local_folder(result.model.source)
    result = result if folder is None else result.with_model(source=str(folder))
    off, other = _compare(result)
    if isinstance(off, str):
        return ScriptCheck(off, other)
    if off <= LIMIT:
        return ScriptCheck(None, other)
    differs = f"on this model diffusers' images differ from those of the search's sampler by {off:.3g} of 255"
    precision = result.model.precision
    if precision == "float32":
        return ScriptCheck(differs, other)
    try:
        plain, _ = _compare(result.with_model(precision="float32"))
    except ModelError as error:
        return ScriptCheck(None, other, f"{differs} in {precision}; they were not compared in float32: {error}")
    if isinstance(plain, str) or plain > LIMIT:
        return ScriptCheck(differs, other)
    return ScriptCheck(None, other, f"{differs} in {precision}, and by {plain:.2g} in float32")


def local_folder(source: str) -> Path | None:
    """The folder in the hub's cache of a hub id; None for a model of another kind.

    ``ModelError`` where the cache does not hold the model in whole.
    """
    if Path(source).exists() or ":" in source or source.count("/") != 1:
        return None
    found = cached_file(source, "model_index.json") or cached_file(source, "config.json")
    if found is None or not is_complete(found.parent):
        raise ModelError(f"{source!r} is not in the hub's cache")
    return found.parent


def _compare(result: Result) -> tuple[float | str, str | None]:
    """Difference of the script's images from ours, of 255, or why it draws none; and what sets the model apart."""
    try:
        wanted, other = _ours(result)
        found = _theirs(result)
    except NOT_HERE as error:
        raise ModelError(f"it cannot be run here ({type(error).__name__}: {first_line(error)})") from error
    return found if isinstance(found, str) else difference(found / 127.5 - 1, wanted.float() / 127.5 - 1), other


def _ours(result: Result) -> tuple[Tensor, str | None]:
    """Images of the search's sampler, and what sets the model apart, which is let go of before the script loads it."""
    config = result.config.model
    with TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.txt"
        prompts.write_text(f"{PROMPT}\n" * CHECKED, encoding="utf-8")
        prompted = {"prompts": str(prompts)} if config.prompts else {}
        model = load_model(config.model_copy(update={**prompted, "compile": False}))
    conditions = model.conditions and model.conditions.fingerprint  # the prompt of a script is its own
    return draw(result, model, CHECKED), other_model(result.model_copy(update={"conditions": conditions}), model)


def _theirs(result: Result) -> Tensor | str:
    """What the script draws, float32 [CHECKED, C, H, W] in [0, 255], or why it draws nothing."""
    with TemporaryDirectory() as place:
        script = Path(place) / f"{result.study}.py"
        result.write(script.with_suffix(".json"))
        script.write_text(diffusers_script(result, images=CHECKED), encoding="utf-8")
        try:
            return run_script(script)
        except AdoptError as error:
            return str(error).partition(";")[0]
        except NOT_HERE:
            raise
        except Exception as error:  # whatever diffusers makes of the model
            return f"diffusers cannot draw with this model as it is here ({type(error).__name__}: {first_line(error)})"


def run_script(script: Path) -> Tensor:
    """float32 [B, C, H, W] in [0, 255] that a script draws; what it and its libraries print is not shown."""
    quiet = io.StringIO()
    with contextlib.ExitStack() as silence:
        silence.enter_context(contextlib.redirect_stdout(quiet))
        silence.enter_context(contextlib.redirect_stderr(quiet))
        silence.enter_context(warnings.catch_warnings(action="ignore"))
        for library in map(logging.getLogger, ("diffusers", "transformers")):
            silence.callback(library.setLevel, library.level)
            library.setLevel(logging.CRITICAL)
        images = runpy.run_path(str(script))["images"]
    if isinstance(images, Tensor):
        return images.float()
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float()
