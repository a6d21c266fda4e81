"""Models by name or path, each made into one ``Model``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from autodiffusion_optuna.errors import ModelError, choose_from
from autodiffusion_optuna.evaluation.models.base import Model, find_device
from autodiffusion_optuna.evaluation.models.diffusers_folder import load_folder
from autodiffusion_optuna.evaluation.models.mixture import mixture_model
from autodiffusion_optuna.evaluation.reference import load_reference

__all__ = ["MODELS", "Model", "find_device", "load_model"]

Loader = Callable[[str, str, bool], Model]

DIGITS = Path(__file__).parent.parent.parent / "assets" / "digits"

MODELS: dict[str, Loader] = {
    "digits": lambda device, precision, clip: _digits(device, precision, clip),
    "mixture": lambda device, precision, clip: mixture_model(device=device, clip=clip),
}
"""Name -> (device, precision, clip) -> model."""


def _digits(device: str, precision: str, clip: bool) -> Model:
    """The bundled model, with the statistics of the digits it was trained on."""
    model = load_folder(DIGITS, device, precision, clip, name="digits")
    return replace(model, reference=partial(load_reference, DIGITS / "reference.npz"))


def load_model(source: str, device: str = "cpu", precision: str = "float32", clip: bool = False) -> Model:
    """The model named ``source`` in ``MODELS``, or else in the diffusers folder at the path ``source``.

    ``device``: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
    ``precision``: of the network, a name of ``denoiser.PRECISIONS``. ``clip``: clamp x0 to [-1, 1].
    Nothing is downloaded. ``ModelError`` where the model or the device cannot be used, ``ConfigError`` where
    another argument is wrong.
    """
    if source in MODELS:
        return MODELS[source](device, precision, clip)
    if not Path(source).is_dir():
        raise ModelError(f"{choose_from('model', source, MODELS)}, or the path of a diffusers folder")
    return load_folder(Path(source), device, precision, clip)
