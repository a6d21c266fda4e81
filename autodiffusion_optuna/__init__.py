"""Search the timesteps and skipped layers of a frozen diffusion model with Optuna."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import AdoptError

if TYPE_CHECKING:
    from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
    from autodiffusion_optuna.search.space import SearchSpace

__version__ = "0.1.0"

__all__ = ["AdoptError", "AutoDiffusionSampler", "Candidate", "SearchSpace", "__version__"]


def __getattr__(name: str) -> object:
    """Import Optuna only when one of its users is asked for: the command line must start fast."""
    if name == "AutoDiffusionSampler":
        from autodiffusion_optuna.search.sampler import AutoDiffusionSampler

        return AutoDiffusionSampler
    if name == "SearchSpace":
        from autodiffusion_optuna.search.space import SearchSpace

        return SearchSpace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
