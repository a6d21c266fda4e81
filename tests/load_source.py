"""Models as a study file's ``[model]`` opens them, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autodiffusion_optuna.config import ModelConfig
from autodiffusion_optuna.evaluation.models import Model, load_model


def load_source(source: str | Path, *, trust: bool = False, **settings: Any) -> Model:
    """The model ``source`` with settings of ``[model]``, on the CPU; paths may be ``Path``."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return load_model(ModelConfig(source=str(source), **{"device": "cpu", **given}), trust=trust)
