"""Search the timesteps and skipped layers of a frozen diffusion model with Optuna."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import AdoptError

if TYPE_CHECKING:
    from autodiffusion_optuna.export.pipelines import apply, remove
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
    from autodiffusion_optuna.search.space import SearchSpace

__all__ = [
    "AdoptError",
    "AutoDiffusionSampler",
    "Candidate",
    "Result",
    "SearchSpace",
    "__version__",
    "apply",
    "remove",
]

LAZY = {
    "AutoDiffusionSampler": "search.sampler",
    "Result": "export.result",
    "SearchSpace": "search.space",
    "apply": "export.pipelines",
    "remove": "export.pipelines",
}
"""Public name -> its module, imported when the name is first asked for: the command line must start fast."""


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
