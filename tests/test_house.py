"""The house keeps its order: what lies where, who imports whom, whose private names are used by whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = "autodiffusion_optuna"
PACKAGE = ROOT / NAME
FILES = {"__init__", "__main__", "_version", "api", "errors", "files", "candidate", "noise", "config", "images"}
FOLDERS = {"search", "evaluation", "storage", "results", "export", "study", "report", "workers", "cli", "assets"}
# A module may import those of smaller rank, and its own folder's.
RANK = {
    "errors": 0, "_version": 0, "files": 1, "candidate": 1, "noise": 1, "images": 1, "config": 2, "search": 3,
    "evaluation": 3, "storage": 3, "results": 4, "export": 5, "study": 6, "report": 7, "workers": 7, "api": 8, "cli": 8,
    "__init__": 9, "__main__": 9,
}  # fmt: skip
LEAF = f"{NAME}.storage.attrs"
"""Names of what is stored: everybody may import them."""
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "cleanfid"}
LIGHT = {"images", "files", "config", "search", "storage", "results", "report", "api", "cli", "__init__"}
"""What needs no torch: a listing of studies comes at once, and a sampler is imported beside any other library."""
LONGEST = 500
OPTUNA = {"optuna", "optuna_dashboard"}


def dotted(path: Path) -> str:
    """A module's name: ``autodiffusion_optuna.storage.attrs``; a folder's is that of its ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module: str) -> str:
    """The file or folder at the top level that a module is, or lies in."""
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TESTS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(node: ast.AST, module_level: bool) -> Iterator[ast.AST]:
    """All below a node; at module level without functions, and without what is imported for types alone."""
    for child in ast.iter_child_nodes(node):
        if module_level and (
            isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        ):
            continue
        yield child
        yield from statements(child, module_level)


def imported(path: Path, *, module_level: bool = False) -> list[str]:
    """Dotted names of everything that a file imports; of ``from a import b`` it is ``a.b``."""
    names = []
    for node in statements(tree(path), module_level):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_of(name: str) -> str:
    """The module of the package that an imported name lies in, or is."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@cache
def neighbours(module: str, module_level: bool) -> frozenset[str]:
    """Modules of the package that one imports, and other libraries' roots."""
    found = set()
    for name in imported(MODULES[module], module_level=module_level):
        root = name.split(".")[0]
        found.add(module_of(name) if root == NAME else root)
    return frozenset(found)


@cache
def loaded_with(module: str) -> dict[str, str]:
    """What is loaded when a module is, and which module asked for it: at module level, and on from there."""
    found, waiting = {module: ""}, [module]
    while waiting:
        asking = waiting.pop()
        wanted = set(neighbours(asking, True)) if asking in MODULES else set()
        if asking.startswith(NAME):  # its folders come first
            wanted |= {asking.rsplit(".", depth)[0] for depth in range(1, asking.count(".") + 1)}
        for name in wanted - found.keys():
            found[name] = asking
            waiting.append(name)
    return found


def road(module: str, name: str) -> str:
    """How a module came to load ``name``, for a message."""
    steps = [name]
    while steps[-1] != module:
        steps.append(loaded_with(module)[steps[-1]])
    return " <- ".join(steps)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_the_top_level_is_that_of_the_design() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")}, {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert found[0] == FILES
    assert found[1] - {"__pycache__"} == FOLDERS
    assert set(RANK) == FILES | FOLDERS - {"assets"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module: str) -> None:
    """Those of functions and of types too."""
    for other in neighbours(module, False):
        if other == NAME and part(module) != "__main__":
            # Only its version is asked of the whole.
            names = {n for n in imported(MODULES[module]) if module_of(n) == NAME} if other in MODULES else set()
            assert names <= {f"{NAME}.__version__"}, f"{module} imports {names}"
        elif other.startswith(NAME + ".") and other != LEAF and part(other) != part(module):
            assert RANK[part(other)] < RANK[part(module)], f"{module} imports {other}"


def test_the_names_of_what_is_stored_import_nothing_of_the_package() -> None:
    assert not [name for name in neighbours(LEAF, False) if name.startswith(NAME)]


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) in LIGHT])
def test_light_parts_load_no_torch(module: str) -> None:
    heavy = HEAVY & loaded_with(module).keys()
    assert not heavy, [road(module, name) for name in heavy]


@pytest.mark.parametrize("module", [m for m in MODULES if RANK[part(m)] < RANK["study"]])
def test_the_two_halves_meet_only_in_study_and_above(module: str) -> None:
    parts = {part(name): name for name in loaded_with(module) if name.startswith(NAME + ".")}
    if part(module) == "evaluation":
        assert "optuna" not in loaded_with(module), road(module, "optuna")
    met = [road(module, parts[half]) for half in ("search", "evaluation") if half in parts]
    assert len(met) < 2, met


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) != "cli"])
def test_only_the_command_line_prints_and_parses(module: str) -> None:
    assert not {"typer", "rich"} & neighbours(module, False)


def others_private_names(path: Path) -> list[str]:
    """Private names that a file imports from Optuna, or asks of any object but its own.

    The objects of ``evaluation`` and ``export`` are diffusers' and torch's.
    """
    found = [name for name in imported(path) if name.split(".")[0] in OPTUNA and any(map(is_private, name.split(".")))]
    if part(dotted(path)) in ("evaluation", "export"):
        return found
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) not in ("self", "cls"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = ast.unparse(node.args[1]).strip("'")
            found += [ast.unparse(node)] if is_private(name) else []
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) != "storage"])
def test_private_names_of_optuna_stay_in_storage(module: str) -> None:
    assert not others_private_names(MODULES[module])


def test_storage_itself_uses_few_of_them() -> None:
    """Ids of studies and trials, a study's storage, and the names of Optuna's tables."""
    used = [name for module in MODULES if part(module) == "storage" for name in others_private_names(MODULES[module])]
    assert sorted(used) == ["optuna.storages._rdb.models", "study._storage", "study._study_id", "trial._trial_id"]


@pytest.mark.parametrize("module", MODULES)
def test_a_long_file_says_why_it_is_one(module: str) -> None:
    lines = MODULES[module].read_text().count("\n")
    reason = re.search(r"\b(one file|lines)\b", ast.get_docstring(tree(MODULES[module])) or "", re.IGNORECASE)
    assert lines <= LONGEST or reason, f"{lines} lines: its docstring is to say why it is one file"


def test_help_and_listings_need_no_torch() -> None:
    """The same seen from outside, with what other libraries load."""
    code = (
        "import sys; sys.argv = ['adopt', '--help']\n"
        f"from {NAME}.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"import {NAME}.results.status, {NAME}.export.formats\n"
        "heavy = {'torch', 'diffusers', 'cleanfid', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_and_benchmarks_use_public_names(path: Path) -> None:
    ours = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            ours |= {alias.asname or alias.name: alias.name for alias in node.names}
    private = [name for name in ours.values() if is_private(name)]
    private += [
        ast.unparse(node)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in ours
    ]
    assert not private


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_imports_from_another(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith(("test_", "conftest"))]
