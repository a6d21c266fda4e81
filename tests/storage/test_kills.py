"""A worker killed at a write of a study's beginning or of one of its first trials locks nothing and loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("kind", "writes"),
    [
        ("sqlite", "some"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in [("sqlite", "every"), ("postgres", "some")]),
        pytest.param("postgres", "every", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_write_can_be_looked_at_and_goes_on_as_if_undisturbed(
    request: pytest.FixtureRequest, folder: Path, kind: str, writes: str
) -> None:
    url = request.getfixturevalue("server") if kind == "postgres" else "sqlite"
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder), url, writes]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(f"{kind}: killed at {told['tried']} of {told['writes']} writes, {len(told['failures'])} locked or changed")
    assert told["failures"] == {}
    assert told["writes"] > 100
    assert told["tried"] == told["writes"] or writes == "some"
