"""The two halves never meet but in study.py, and imports run downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "autodiffusion_optuna"
NAME = PACKAGE.name
# A module may import those of smaller rank; parts of one half may import each other.
RANK = {
    "errors": 0, "_version": 0, "images": 1, "candidate": 1, "noise": 1, "config": 2, "search": 3, "evaluation": 3,
    "storage": 3, "results": 4, "export": 5, "study": 6, "report": 7, "workers": 7, "cli": 8,
    "__init__": 9, "__main__": 9,
}  # fmt: skip
COMMANDS = ("cli",)
TORCH_FREE = ("images", "config", "search", "storage", "results", "report", "cli")
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def part(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, type-checking imports and function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_part_has_a_rank() -> None:
    assert {part(module) for module in MODULES} == set(RANK)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_downward(module: Path) -> None:
    for name in imported(PACKAGE / module):
        if not name.startswith(NAME + "."):
            continue
        other = name.split(".")[1]
        if other in RANK and other != part(module):
            assert RANK[other] < RANK[part(module)], f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_heavy_libraries_stay_in_their_half(module: Path) -> None:
    roots = {name.split(".")[0] for name in imported(PACKAGE / module)}
    if part(module) in TORCH_FREE:
        assert not roots & {"torch", "diffusers", "cleanfid"}
    if part(module) == "evaluation":
        assert "optuna" not in roots
    if part(module) not in COMMANDS:
        assert not roots & {"typer", "rich"}


def test_help_and_presets_need_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['adopt', '--help']\n"
        "from autodiffusion_optuna.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "import autodiffusion_optuna.results.status, autodiffusion_optuna.export.scripts\n"
        "heavy = {'torch', 'diffusers', 'cleanfid', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
