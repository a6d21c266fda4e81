"""What a shell sees of ``adopt``: commands that run as they are printed, help that is whole, names after Tab."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from command import Adopt

from autodiffusion_optuna import config
from autodiffusion_optuna.cli import completion
from autodiffusion_optuna.cli.main import app
from autodiffusion_optuna.errors import choose_from, program
from autodiffusion_optuna.evaluation.features import EXTRACTORS
from autodiffusion_optuna.workers.launch import ENGINES

PACKAGE = Path(config.__file__).parent
ENTRY = f"#!{sys.executable}\nfrom autodiffusion_optuna.cli.main import main\nmain()\n"
NEXT = re.compile(r"^  (.*?)    # ", re.MULTILINE)


@pytest.fixture
def bin_folder(folder: Path) -> Path:
    """A folder with an ``adopt`` like the one that is installed, as of a new virtual environment."""
    place = folder / "my env" / "bin"
    place.mkdir(parents=True)
    (place / "adopt").write_text(ENTRY)
    (place / "adopt").chmod(0o755)
    return place


def shell(command: str, *, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a shell whose PATH has no ``adopt`` beside those of ``path``."""
    bare = [part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "adopt").exists()]
    env = {
        **{key: value for key, value in os.environ.items() if key != "UV"},
        "PATH": os.pathsep.join([*([path] if path else []), *bare]),
        **environment,
    }
    env["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), env.get("PYTHONPATH", "")])
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["path", "whole path", "name", "module"])
def test_the_next_commands_run_as_they_are_printed(bin_folder: Path, how: str) -> None:
    path = str(bin_folder) if how == "name" else None
    python = shlex.quote(sys.executable)
    called, printed = {
        "path": ("'my env/bin/adopt'", "'my env/bin/adopt'"),
        "whole path": (f"cd /; cd - >&2; '{bin_folder}/adopt'", "'my env/bin/adopt'"),
        "name": ("adopt", "adopt"),
        "module": (f"{python} -m autodiffusion_optuna", f"{python} -m autodiffusion_optuna"),
    }[how]
    done = shell(f"{called} run --study quick", path=path)
    commands = NEXT.findall(done.stdout)
    assert commands[0] == f"{printed} show --study quick", done
    assert len(commands) == 4
    shown = shell(commands[0], path=path)
    assert (shown.returncode, "best found" in shown.stdout) == (0, True), shown
    assert f"Try {printed} --help" in shell(f"{called} walk", path=path).stderr


def test_the_whole_path_is_printed_from_elsewhere_and_where_another_adopt_is_found_first(
    folder: Path, bin_folder: Path
) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "adopt").write_text("#!/bin/sh\n")
    (folder / "other" / "adopt").chmod(0o755)
    done = shell(f"cd other; '{bin_folder}/adopt' show --study x", path=str(folder / "other"))
    assert f"start a study with `'{bin_folder}/adopt' run`" in done.stderr


def test_a_link_on_the_path_is_the_program(folder: Path, bin_folder: Path) -> None:
    (folder / "links").mkdir()
    (folder / "links" / "adopt").symlink_to(bin_folder / "adopt")
    assert "start a study with `adopt run`" in shell("adopt show --study x", path=str(folder / "links")).stderr


def test_uvx_puts_the_program_on_a_path_that_the_shell_does_not_have(bin_folder: Path) -> None:
    done = shell("adopt show --study x", path=str(bin_folder), UV="/usr/bin/uv")
    assert "start a study with `'my env/bin/adopt' run`" in done.stderr


def test_from_python_the_program_is_adopt(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["/tmp/search.py"], [""], [], ["adopt", "run"], ["/tmp/other/__main__.py"]):
        monkeypatch.setattr(sys, "argv", arguments)
        assert program() == "adopt"


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module that is not a docstring or help, which name the command itself."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.keyword) and node.arg == "help":
            skipped.update(part for part in ast.walk(node) if isinstance(part, ast.Constant))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def test_no_message_names_a_command_by_hand() -> None:
    commands = "|".join(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    by_hand = [
        f"{path.relative_to(PACKAGE)}:{line}: {text}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "report"  # a page is read elsewhere
        for line, text in strings(path)
        if re.search(rf"\badopt ({commands})\b", text)
    ]
    assert by_hand == []


def every_command(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, (*words, name))


COMMANDS = dict(every_command(typer.main.get_command(app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_at_80_columns_is_whole(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    with command.make_context("adopt", [], resilient_parsing=True, terminal_width=80) as context:
        text = command.get_help(context)
    assert "..." not in text.replace("[ARGS]...", "")
    assert max(map(len, text.splitlines())) <= 80


def test_help_names_the_choices(adopt: Adopt) -> None:
    assert tuple(ENGINES) == completion.ENGINES
    assert tuple(EXTRACTORS) == completion.EXTRACTORS
    assert get_args(config.Mode) == completion.MODES
    assert f"--engine [{'|'.join(ENGINES)}]" in adopt("run", "--help").out
    building = " ".join(adopt("reference", "build", "--help").out.split())
    assert f"--mode [{'|'.join(completion.MODES)}]" in building
    assert f"{', '.join(EXTRACTORS)}." in building


def test_completion_takes_two_lines_of_the_help_and_no_other_command_offers_it(adopt: Adopt) -> None:
    text = adopt("--help").out
    assert "--install-completion" in text
    assert "--install-completion" not in adopt("run", "--help").out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["bash", "zsh"])
def test_tab_offers_studies_settings_and_choices(adopt: Adopt, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("_ADOPT_COMPLETE", f"complete_{kind}")

    def tab(words: str) -> list[str]:
        """What the shell's completion function is told for a line; the last word is being typed."""
        if kind == "bash":
            monkeypatch.setenv("COMP_WORDS", words)
            monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
            return adopt().out.split()
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
        return re.findall(r'"([^"]+)"', adopt().out)

    assert tab("adopt show --study ") == ["quick"]
    assert {"quick", "digits-4", "mixture-4"} <= set(tab("adopt run --study "))
    assert tab("adopt run --study mix") == ["mixture-4"]
    assert tab("adopt show --storage nowhere.db --study ") == []
    assert tab("adopt show --storage what: --study ") == []
    assert tab("adopt run --set search.see") == ["search.seed="]
    assert tab("adopt run --set model.precision=b") == ["model.precision=bfloat16"]
    assert tab("adopt run --set sampling.final=") == ["sampling.final=zero", "sampling.final=sigma_min"]
    assert tab("adopt run --set sampling.nothing=") == tab("adopt run --set model.source=") == []
    assert tab("adopt run --engine s") == ["slurm"]
    assert tab("adopt reference build --extractor cl") == ["clip"]
    assert not Path("nowhere.db").exists()


def test_bash_completes_in_a_session_of_its_own(bin_folder: Path) -> None:
    """The function that --install-completion writes, called as bash calls it."""
    script = shell("adopt --show-completion", path=str(bin_folder), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert script.returncode == 1  # typer then wants the name of the shell
    line = (
        'eval "$(adopt --show-completion bash)"; COMP_WORDS=(adopt run --study mix) COMP_CWORD=3; '
        '_adopt_completion adopt; echo "${COMPREPLY[@]}"'
    )
    done = shell(line, path=str(bin_folder), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.stdout.strip() == "mixture-4", done


@pytest.mark.usefixtures("quick")
def test_tab_imports_no_model_code() -> None:
    code = (
        "import os, sys\n"
        "os.environ |= {'_ADOPT_COMPLETE': 'complete_bash', 'COMP_WORDS': 'adopt show --study ', 'COMP_CWORD': '3'}\n"
        "sys.argv = ['adopt']\n"
        "from autodiffusion_optuna.cli.main import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["quick"]), done


def test_a_name_that_is_known_twice_is_listed_once() -> None:
    """Of a study that is named as its preset is."""
    assert choose_from("study", "digits-5", ["digits-4", "mine", "digits-4"]).endswith("Known: digits-4, mine")
