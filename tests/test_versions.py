"""Libraries whose private names or behaviour we depend on are of the versions that were tried."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
BOUNDED = {
    "optuna": """
        storage/ uses private names of optuna.storages (tests/test_house.py keeps them there): compare each with the new
        version, and the tables in optuna/storages/_rdb/models.py: new ones need `adopt storage upgrade`. Then run
        tests/storage, tests/workers (with -m slow too) and tests/search/test_sampler_contract.py.""",
    "optuna-dashboard": """
        report/dashboard.py relies on where it keeps notes, plots and artifacts, and on its routes. Look at its
        release notes, open `adopt dashboard --study digits-4` in a browser, and run tests/report.""",
    "diffusers": """
        evaluation/units.py returns what a block's own forward would, evaluation/solvers.py repeats the schedulers'
        arithmetic, evaluation/models/ reads configs with diffusers' defaults, and export/ prints its pipelines' names:
        look at the release notes for blocks, schedulers, defaults and renamed arguments, and run tests/evaluation and
        tests/export.""",
    "scipy": """
        clean-fid calls sqrtm(disp=), which 1.18 removed: look whether clean-fid has a release without it, and run
        tests/evaluation/test_cleanfid.py.""",
}
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = {r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *(line for e in EXTRAS for line in e)])}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bounded_library_is_of_a_version_that_was_tried(name: str) -> None:
    tried = REQUIREMENTS[name].specifier
    assert version(name) in tried, (
        f"{name} {version(name)} was not tried, only {tried}. To lift the bound in pyproject.toml: "
        + " ".join(BOUNDED[name].split())
    )


def test_every_bound_says_what_to_look_at_when_it_is_lifted() -> None:
    assert {name for name, requirement in REQUIREMENTS.items() if "<" in str(requirement.specifier)} == set(BOUNDED)
    for paths in BOUNDED.values():
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", paths):
            assert (Path(__file__).parent.parent / path).exists(), path
