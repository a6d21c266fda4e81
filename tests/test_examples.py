"""The notebook and the examples of the documentation run as they are printed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; the value of its last expression, None for another last statement."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "cell", "exec"), names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs_and_shows_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text())["cells"]}
    names: dict[str, Any] = {}
    shown = {
        key: run_cell("".join(cell["source"]), names) for key, cell in cells.items() if cell["cell_type"] == "code"
    }
    assert "best found" in shown["table"]._repr_html_()
    assert len(shown["plot"].data) > 1
    assert len(shown["history"].data) > 1
    assert shown["sample"].size == (3 * 12 * 28, 3 * 2 * 28)
    assert shown["apply"].size == (84, 84)
    assert len(shown["own"]) == 3
    assert json.loads((tmp_path / "digits-4.json").read_text())["timesteps"] == list(names["study"].best_timesteps)
    printed = capsys.readouterr().out
    assert "10 of 10 candidates" in printed
    assert "from diffusers import" in printed


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    assert not [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")]


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        run_cell(block, names)
    assert names["found"].shape == (8, 16, 16, 3)
    assert names["again"].shape == (4, 4, 4, 1)
    assert len(names["images"]) == 2
    assert (tmp_path / "best.json").is_file()
    assert names["study"].name == "kept"
