"""Shared fixtures: the command line in-process, and a study file that runs in a second."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from command import Adopt, Result

torch.set_num_threads(1)  # small tensors: more threads only add noise

QUICK = """
description = "a study for tests"

[model]
source = "mixture"
device = "cpu"
batch = 32

[sampling]
steps = 3

[search]
trials = 24
population = 6
parents = 3

[score]
extractor = "pixels"
images = 64
fresh_images = 64
fresh_banks = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder holding only ``quick.toml``, and no storage set by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADOPT_STORAGE", raising=False)
    (tmp_path / "quick.toml").write_text(QUICK)
    return tmp_path


@pytest.fixture
def adopt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Adopt:
    """Run ``adopt ARGUMENTS`` in this process."""
    from autodiffusion_optuna.cli import main

    def command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["adopt", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, captured.out, captured.err)

    return command
