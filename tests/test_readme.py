"""What README and docs/ say exists, runs, and is all there is."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from command import Adopt
from PIL import Image
from tiny_models import write_ddpm

from autodiffusion_optuna import __version__
from autodiffusion_optuna.cli.main import app
from autodiffusion_optuna.config import ModelConfig, known_keys, parse_config, presets
from autodiffusion_optuna.evaluation.features import EXTRACTORS, load_extractor
from autodiffusion_optuna.evaluation.models import load_model
from autodiffusion_optuna.evaluation.solvers import ORDERS, SOLVERS
from autodiffusion_optuna.export.formats import FORMATS
from autodiffusion_optuna.study.components import read_sampling

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
ALL = "\n".join(TEXTS.values())
BY_HAND = re.sub(r"<!-- from .*?<!-- end -->", "", ALL, flags=re.DOTALL)
LONGEST = 225
SECTIONS = {
    "model": {"source": "digits"}, "sampling": {"steps": 4}, "search": {"trials": 9}, "score": {"extractor": "digits"}
}  # fmt: skip
"""What an example that shows only some tables leaves out."""


def fences(language: str, *names: str) -> list[tuple[str, str]]:
    """(page, text) of every fence of a language, in all pages or those given."""
    pattern = rf"^```{language}\n(.*?)^```"
    found = {name: re.findall(pattern, TEXTS[name], flags=re.DOTALL | re.MULTILINE) for name in names or TEXTS}
    return [(name, text) for name, texts in found.items() for text in texts]


def commands() -> dict[str, set[str]]:
    """Words of every command and group -> its options, as the code declares them."""

    def walk(command: Any, path: str) -> Iterator[tuple[str, set[str]]]:
        yield path, {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, member in getattr(command, "commands", {}).items():
            yield from walk(member, f"{path} {name}")

    return dict(walk(typer.main.get_command(app), "adopt"))


COMMANDS = commands()


def shown_commands() -> list[str]:
    """Every line of a console fence that runs ``adopt``, without its comment."""
    lines = [line for _, text in fences("console") for line in text.splitlines()]
    return [match[1] for line in lines if (match := re.match(r"\$ (?:uvx --from \S+ )?(adopt .*?)\s*(?:#.*)?$", line))]


def test_readme_is_short_and_names_every_page() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= LONGEST
    for name in TEXTS.keys() - {"README.md", "docs/package.md"}:  # a package index shows the latter instead of README
        assert f"({name})" in TEXTS["README.md"], f"README does not lead to {name}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", TEXTS[name]):
        assert (PAGES[name].parent / target).exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_parts_are_those_of_the_code_and_of_the_committed_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    assert generate.generated(TEXTS[name]) == TEXTS[name], "make docs writes it again"


def test_every_command_is_shown_with_an_example() -> None:
    shown = shown_commands()
    for path in COMMANDS:
        assert any(f"{line} ".startswith(f"{path} ") for line in shown), path


def test_every_option_is_documented() -> None:
    page = TEXTS["docs/commands.md"]
    sections = dict(re.findall(r"^### `(.*?)`\n(.*?)(?=^###|^<!-- end)", page, flags=re.DOTALL | re.MULTILINE))
    for path, options in COMMANDS.items():
        for option in options:
            assert re.search(rf"[`, ]{re.escape(option)}[`, ]", sections[path]), f"{path} {option}"


@pytest.mark.parametrize("line", shown_commands())
def test_commands_that_are_shown_exist(line: str) -> None:
    words = shlex.split(line.split(" > ")[0])
    path = words.pop(0)
    while words and f"{path} {words[0]}" in COMMANDS:
        path += f" {words.pop(0)}"
    if path == "adopt":
        assert words, line
        assert words[0].startswith("--"), f"adopt has no command {words[0]}"
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in COMMANDS[path], line


def test_every_setting_has_its_row() -> None:
    page = TEXTS["docs/settings.md"]
    for key in known_keys():
        assert f"| `{key.split('.')[:2][-1]}` |" in page, key


def test_every_solver_extractor_preset_format_and_extra_is_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys() - {"test"}
    for name in [*SOLVERS, *ORDERS, *EXTRACTORS, *presets(), *extras]:
        assert re.search(rf'`"?{name}\b', ALL), name
    for name in FORMATS:
        assert re.search(rf"--format {name}\b|`{name}`", BY_HAND), name


@pytest.mark.parametrize(("name", "text"), fences("toml"))
def test_study_files_are_valid(name: str, text: str) -> None:
    given = tomllib.loads(text)
    config = parse_config({"name": "mine", **{key: {**SECTIONS[key], **given.get(key, {})} for key in SECTIONS}})
    read_sampling(config.sampling)
    assert config.score.extractor.partition(":")[0] in EXTRACTORS


def test_the_smallest_study_file_runs_on_an_unconditional_model(folder: Path, adopt: Adopt) -> None:
    write_ddpm(folder / "my-model")
    (folder / "photos").mkdir()
    draws = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    (folder / "my-model.toml").write_text(fences("toml", "README.md")[0][1])
    fewer = ("search.trials=3", "score.images=16", "score.held_out_images=16", "score.held_out_banks=2")
    ran = adopt("run", "--study", "my-model.toml", *(word for setting in fewer for word in ("--set", setting)))
    assert ran.code == 0, ran
    assert "3 of 3" in ran.out


@pytest.mark.parametrize("name", ["README.md", "docs/how-it-works.md"])
def test_python_examples_run_and_are_short(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((_, example),) = fences("python", name)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    exec(compile(example, name, "exec"), {})
    assert len(capsys.readouterr().out.split(",")) == 4


@pytest.mark.parametrize(("name", "text"), [*fences("python"), *fences("py")])
def test_python_is_python(name: str, text: str) -> None:
    compile(text, name, "exec")


def test_the_plug_in_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, text),) = fences("python", "docs/models.md")
    (tmp_path / "shown_model.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_model(ModelConfig(source="python:shown_model:shrink"), device="cpu", trust=True)
    assert model.shape == (3, 8, 8)


def test_the_extractor_of_ones_own_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, text),) = fences("python", "docs/your-own-model.md")
    (tmp_path / "shown_extractor.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    monkeypatch.setattr(torch.hub, "load", lambda *given, **options: network)  # in place of a download
    extractor = load_extractor("python:shown_extractor:features", "cpu", trust=True, image_shape=(3, 32, 32))
    assert extractor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 12)


def test_readme_opens_with_what_make_demo_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    assert f"](benchmarks/results/{tables.DEMO}.png)" in TEXTS["README.md"]
    assert f"run --study {tables.DEMO}\n" in (ROOT / "Makefile").read_text()


def test_nothing_is_installed_from_an_index_that_lacks_it() -> None:
    assert not re.findall(r"(?:pip|pipx|uv|uvx) .*autodiffusion[-_]optuna(?:\[|\s|\"|$)", ALL)


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
