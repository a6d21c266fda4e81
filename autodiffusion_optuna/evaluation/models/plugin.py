"""Models from a user's own Python function."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.errors import AdoptError, ConfigError, ModelError, first_line
from autodiffusion_optuna.evaluation.denoiser import (
    PREDICTIONS,
    UNCONDITIONAL,
    Condition,
    Denoiser,
    Network,
    store_reduced,
)
from autodiffusion_optuna.evaluation.models.base import (
    Model,
    assemble,
    check_unused,
    choose_clip,
    label_conditions,
    trace_units,
)
from autodiffusion_optuna.noise import NoiseSchedule


@dataclass(frozen=True, eq=False)
class PluginModel:
    """What a plug-in's function returns, or a mapping with these keys.

    ``network``: (x float32 [B, C, H, W], model times float32 [B], condition) -> prediction [B, C or 2C, H, W]; the
    second half of 2C channels is a learned variance and is dropped. ``condition`` is ``{}``, or with ``labels``
    ``{"label": int64 [B]}``. A ``torch.nn.Module`` is moved to the device and frozen, and its blocks of the classes in
    ``skip.SHORTCUTS`` can be skipped. ``shape``: (C, H, W) of a state. ``schedule``: of the noise, see ``noise``.
    ``prediction``: a name of ``denoiser.PREDICTIONS``. ``fingerprint``: tells this model and its weights from all
    others, such as the sha256 of the weights' file; a study is resumed only with the same one.
    ``labels``: number of classes; None where the model is unconditional. ``decode``: float32 [B, C, H, W] states
    -> images [B, 1 or 3, H', W'] in about [-1, 1]; None where states are images.
    """

    network: Network
    shape: tuple[int, int, int]
    schedule: NoiseSchedule
    prediction: str
    fingerprint: str
    labels: int | None = None
    decode: Callable[[Tensor], Tensor] | None = None


def load_plugin(config: ModelConfig, device: torch.device, trust: bool) -> Model:
    """The model that a user's function makes; ``model.source``: ``"python:module:function"``.

    The module is imported with the current folder on the path, and ``function(device=torch.device(...))`` returns a
    ``PluginModel``, a mapping with its fields, or a whole ``Model``. As this runs code, ``trust`` must be given.
    A file ``mine.py`` with this function is the source ``"python:mine:shrink"``::

        import torch
        from autodiffusion_optuna.evaluation.models.plugin import PluginModel
        from autodiffusion_optuna.noise import linear

        def shrink(device):
            schedule = linear(1000)
            def network(x, t, condition):  # eps of data that is standard normal
                sigma = torch.as_tensor(schedule.sigmas, dtype=torch.float32, device=device)[t.long()]
                return sigma[:, None, None, None] * x
            return PluginModel(network, (3, 8, 8), schedule, "epsilon", fingerprint="standard normal, 1")

    A whole ``Model`` sets its own precision and clip.
    ``ConfigError`` without trust or with a setting that the model does not use, ``ModelError`` that names the function
    where it, or later its network, raises or returns something else.
    """
    if not trust:
        raise ConfigError(f"{config.source} would run Python code of your own; add --trust if you mean it to")
    name = config.source.removeprefix("python:")
    check_unused(config, name)
    made = _guarded(_function(name), name)(device=device)
    if isinstance(made, Model):
        for setting, given in (("precision", config.precision != "float32"), ("clip", config.clip is not None)):
            if given:
                raise ConfigError(
                    f"{name} returns a whole Model, which sets its own {setting}; leave model.{setting} out"
                )
        return made
    plugin = _check(made, name)
    conditions = label_conditions(range(plugin.labels), device, draw=config.labels) if plugin.labels else None
    some = conditions.rows([0]) if conditions else UNCONDITIONAL
    units = None
    network: Network = _guarded(plugin.network, name)
    if isinstance(plugin.network, nn.Module):
        plugin.network.to(device).eval().requires_grad_(False)
        store_reduced(plugin.network, config.precision)
        units = trace_units(
            plugin.network, lambda x, t: network(x, t, some), plugin.shape, device, config.precision, name
        )
    clip = choose_clip(config.clip, name, latent=plugin.decode is not None)
    denoiser = Denoiser(network, plugin.schedule, plugin.prediction, device, config.precision, clip, units)
    decode = None if plugin.decode is None else _guarded(plugin.decode, name)
    return assemble(
        config,
        denoiser,
        name=name,
        fingerprint=_fingerprint(plugin),
        shape=plugin.shape,
        conditions=conditions,
        decode=decode,
        image_shape=_try(denoiser, plugin, decode, some, name),
        kind="plugin",
    )


def _function(name: str) -> Callable[..., Any]:
    """The function ``"module:function"``, with the current folder on the path."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ConfigError(f"'python:{name}' names no function; write python:module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # and left there, for what the function imports later
    found = getattr(_guarded(importlib.import_module, name)(module), function, None)
    if not callable(found):
        raise ModelError(f"{name}: module {module!r} has no function {function!r}; write python:module:function")
    return cast("Callable[..., Any]", found)


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function`` whose errors are one line; what the evaluator handles itself, too little memory, goes through."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (AdoptError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a user's code raises
            raise ModelError(f"{name} raised {type(error).__name__}: {first_line(error)}; fix the plug-in") from error

    return guarded


def _check(made: object, name: str) -> PluginModel:
    """What the function returned; ``ModelError`` that names the first field that does not fit."""
    if isinstance(made, Mapping):
        try:
            made = PluginModel(**made)
        except TypeError as error:
            raise ModelError(f"{name}: {first_line(error).replace('PluginModel.__init__()', 'the mapping')}") from error
    if not isinstance(made, PluginModel):
        raise ModelError(f"{name} returned a {type(made).__name__}; return a PluginModel, a mapping like it or a Model")
    shape, labels = made.shape, made.labels
    sizes = isinstance(shape, (tuple, list)) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    for field, fits, wanted in (
        ("network", callable(made.network), "a function of (x, t, condition)"),
        ("shape", sizes, "(C, H, W), positive integers"),
        ("schedule", isinstance(made.schedule, NoiseSchedule), "a NoiseSchedule"),
        ("prediction", made.prediction in PREDICTIONS, f"one of {', '.join(PREDICTIONS)}"),
        ("fingerprint", isinstance(made.fingerprint, str) and made.fingerprint != "", "a text that is not empty"),
        ("labels", labels is None or (type(labels) is int and labels > 0), "a positive integer, or None"),
        ("decode", made.decode is None or callable(made.decode), "a function of states, or None"),
    ):
        if not fits:
            raise ModelError(
                f"{name}: {field} is {first_line(ValueError(repr(getattr(made, field))))}; make it {wanted}"
            )
    levels = np.stack([made.schedule.alphas, made.schedule.sigmas, made.schedule.model_times])
    if not (np.isfinite(levels).all() and (levels[:2] > 0).all() and (np.diff(levels[1] / levels[0]) > 0).all()):
        raise ModelError(
            f"{name}: schedule has levels that no solver can use; make alphas and sigmas positive and finite, sigma / "
            "alpha increasing (noise.zero_terminal_snr for a model without a signal at the end)"
        )
    channels, height, width = shape
    return replace(made, shape=(channels, height, width))


def _try(
    denoiser: Denoiser, plugin: PluginModel, decode: Callable[[Tensor], Tensor] | None, some: Condition, name: str
) -> tuple[int, int, int] | None:
    """Run the network and the decoder once; (C, H, W) of an image, None where states are images."""
    x = torch.zeros(1, *plugin.shape, device=denoiser.device)
    try:
        x0 = denoiser(x, plugin.schedule.T // 2, condition=some)
    except ModelError as error:
        raise error if str(error).startswith(name) else ModelError(f"{name}: {error}") from error
    if decode is None:
        return None
    with torch.inference_mode():
        images = decode(x0)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != 1 or images.shape[1] not in (1, 3):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ModelError(f"{name}: decode returned {shape} for one state; return images [B, 1 or 3, H, W]")
    return images.shape[1], images.shape[2], images.shape[3]


def _fingerprint(plugin: PluginModel) -> str:
    """sha256 over all that a plug-in says of its model."""
    said = json.dumps([plugin.fingerprint, plugin.shape, plugin.prediction, plugin.labels, plugin.decode is not None])
    whole = hashlib.sha256(f"plugin {said}".encode())
    for levels in (plugin.schedule.alphas, plugin.schedule.sigmas, plugin.schedule.model_times):
        whole.update(levels.tobytes())
    return whole.hexdigest()
