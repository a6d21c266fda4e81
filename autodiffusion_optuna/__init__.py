"""Search the timesteps and skipped layers of a frozen diffusion model with Optuna."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import AdoptError

if TYPE_CHECKING:
    from autodiffusion_optuna.api import load_study, sample, search
    from autodiffusion_optuna.export.pipelines import apply, remove
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.report.study import StudyReport
    from autodiffusion_optuna.search.race import RacePruner
    from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
    from autodiffusion_optuna.search.space import SearchSpace

__all__ = [
    "AdoptError",
    "AutoDiffusionSampler",
    "Candidate",
    "RacePruner",
    "Result",
    "SearchSpace",
    "StudyReport",
    "__version__",
    "apply",
    "load_study",
    "remove",
    "sample",
    "search",
]

LAZY = {
    "AutoDiffusionSampler": "search.sampler",
    "RacePruner": "search.race",
    "Result": "export.result",
    "SearchSpace": "search.space",
    "StudyReport": "report.study",
    "apply": "export.pipelines",
    "load_study": "api",
    "remove": "export.pipelines",
    "sample": "api",
}
"""Public name -> its module, imported when the name is first asked for: the command line must start fast."""


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})


class _Search(ModuleType):
    """The folder ``search`` is also the function ``api.search``: both names are the right ones."""

    def __call__(self, *args: Any, **kwargs: Any) -> StudyReport:
        from autodiffusion_optuna import api

        return api.search(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        from autodiffusion_optuna import api

        return inspect.signature(api.search)


importlib.import_module(f"{__name__}.search").__class__ = _Search  # the folder itself, which is empty
