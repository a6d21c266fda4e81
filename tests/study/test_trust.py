"""What lies beside a study file is code only for those who trust it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autodiffusion_optuna.study import components
from studies import config_with


@pytest.mark.parametrize("trust", [False, True])
def test_python_files_beside_a_study_are_found_only_with_trust(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    components.build(config_with(folder / "quick.toml", f"folder='{folder}'"), trust=trust)
    assert (str(folder) in sys.path) == trust
