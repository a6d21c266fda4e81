"""What README shows exists and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from autodiffusion_optuna import __version__
from autodiffusion_optuna.cli.main import app
from autodiffusion_optuna.config import known_keys, parse_config, presets, tomllib
from autodiffusion_optuna.evaluation.features import EXTRACTORS
from autodiffusion_optuna.evaluation.solvers import SOLVERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split(",")) == 4


def test_the_study_file_is_valid() -> None:
    (text,) = blocks("toml")
    config = parse_config({"name": "mine", **tomllib.loads(text)})
    assert config.model.source == "my-model"


def test_every_command_is_shown() -> None:
    group = typer.main.get_command(app)
    for name in group.commands:  # type: ignore[attr-defined]
        assert f"adopt {name}" in README, name


def test_every_setting_solver_extractor_and_preset_is_named() -> None:
    names = {key.split(".")[1] for key in known_keys() if "." in key}
    for name in names | set(SOLVERS) | set(EXTRACTORS) | set(presets()):
        assert f"`{name}`" in README, name


def test_pictures_and_result_files_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_files_that_contributors_are_sent_to_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 15
    package = ROOT / "autodiffusion_optuna"
    for path in named:
        places = [ROOT, package, package / "evaluation", ROOT / "tests" / "evaluation"]
        assert any((place / path).exists() for place in places), path


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{__version__}]" in text


def test_the_tables_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    assert tables.studies() in README
    assert tables.layers() in README
    assert tables.facts() in README
