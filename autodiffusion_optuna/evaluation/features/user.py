"""Networks of the user's: TorchScript files and Python functions."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path

import torch

from autodiffusion_optuna.errors import ConfigError, first_line
from autodiffusion_optuna.evaluation.features.base import Extractor, Network, Wanted


def load_torchscript(wanted: Wanted) -> Extractor:
    """A TorchScript file of uint8 [B, C, H, W] to float [B, D]."""
    weights = wanted.require()
    return wanted.extractor(wanted.guard(read_torchscript(wanted, weights)), None, weights, "own", None)


def read_torchscript(wanted: Wanted, weights: Path) -> Network:
    """The network of a TorchScript file."""
    with wanted.reading(weights, "is not TorchScript", "give a file that torch.jit.save wrote"):
        net = torch.jit.load(str(weights), map_location=wanted.device)  # type: ignore[no-untyped-call]
    net.eval()
    return lambda images: net(images)


def load_python(wanted: Wanted) -> Extractor:
    """``python:module:function``, a network or what is called with the device and returns one."""
    wanted.refuse_weights()
    _, _, target = wanted.name.partition(":")
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"extractor {wanted.name!r} names no function; write python:module:function")
    sys.path.insert(0, os.getcwd())  # where a user's module lies; the console script leaves it out
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute)
        parameters = list(inspect.signature(found).parameters)
        network = found(wanted.device) if parameters[:1] == ["device"] else found
    except Exception as error:  # code of the user's can raise anything
        raise ConfigError(
            f"extractor {wanted.name!r} cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "write python:module:function for a module in this folder or installed"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(network):
        raise ConfigError(f"extractor {wanted.name!r} is a {type(network).__name__}; it must be callable")
    source = getattr(module, "__file__", None)
    return wanted.extractor(wanted.guard(network), None, Path(source) if source else None, "own", None)
