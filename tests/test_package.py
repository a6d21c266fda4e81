"""What a package index would show."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import typer

from autodiffusion_optuna.cli.main import app
from autodiffusion_optuna.config import presets

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_text_for_an_index_has_no_link_or_picture_that_only_works_in_a_checkout() -> None:
    text = (ROOT / PROJECT["project"]["readme"]).read_text()
    targets = [*re.findall(r"\]\(([^)]*)\)", text), *re.findall(r"(?:src|href)=[\"']?([^\"'> ]*)", text)]
    assert [target for target in targets if not target.startswith("https://")] == []


def test_its_commands_exist() -> None:
    text = (ROOT / PROJECT["project"]["readme"]).read_text()
    commands = re.findall(r"^\$ adopt (\w+) --study ([\w-]+)", text, flags=re.MULTILINE)
    assert len(commands) >= 4
    assert {name for name, _ in commands} <= typer.main.get_command(app).commands.keys()  # type: ignore[attr-defined]
    assert {study for _, study in commands} <= presets().keys()


def test_what_the_text_sends_to_is_in_the_source_distribution() -> None:
    shipped = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"README.md", "docs", "benchmarks"} <= set(shipped)
    assert {path for path in shipped if not (ROOT / path).exists()} == set()


def test_the_extras_that_install_md_names_are_those_of_the_project() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == PROJECT["project"]["optional-dependencies"].keys() - {"test"}
