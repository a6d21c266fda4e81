"""The parts of README and docs/ that come from the code and from benchmarks/results.

    python docs/generate.py

A part stands between ``<!-- from NAME -->`` and ``<!-- end -->``; NAME is one of ``PARTS``. A test compares every part
with what is written here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from autodiffusion_optuna import config
from autodiffusion_optuna.cli.main import app
from autodiffusion_optuna.evaluation.solvers import CAPPED, SOLVERS, evaluations
from autodiffusion_optuna.export.comfyui import SAMPLERS
from autodiffusion_optuna.export.recipes import RECIPES
from autodiffusion_optuna.noise import Final
from autodiffusion_optuna.search.presets import PRESETS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import rival_text  # noqa: E402
import tables  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PART = re.compile(r"(<!-- from (?P<name>[^>]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


# Settings


def settings(section: str) -> str:
    """A table of all settings of one section, or of those above the sections where it is ``StudyConfig``."""
    schema = config.StudyConfig.model_json_schema()
    model = schema if section == "StudyConfig" else schema["$defs"][section]
    said = docstrings()[section]
    lines = ["| setting | value | default | |", "|---|---|---|---|"]
    for name, field in model["properties"].items():
        if field.get("$ref", "").endswith("Config"):
            continue  # a section of its own
        given = "**must be set**" if name in model.get("required", ()) else default(field["default"])
        given = "the file's" if name == "name" else given
        lines.append(f"| `{name}` | {kind(field)} | {given} | {said[name]} |")
    return "\n".join(lines)


def docstrings() -> dict[str, dict[str, str]]:
    """Class -> field -> the string that stands below it in ``config.py``, on one line of Markdown."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            fields = found.setdefault(node.name, {})
            for field, text in zip(node.body, node.body[1:], strict=False):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                        fields[name] = cell(said)
    return found


def default(value: Any) -> str:
    """A default as a study file has it."""
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`".replace("'", '"')


def kind(field: Mapping[str, Any]) -> str:
    """What a setting may be, from its JSON schema."""
    if "anyOf" in field:
        kinds = [kind(member) for member in field["anyOf"] if member.get("type") != "null"]
        if kinds == ["whole number", "number"]:
            return "number"
        return " or ".join("a list" if k == f"list: {kinds[0]}" else k for k in kinds)
    if "$ref" in field:
        return "`{ min = …, max = … }`"
    if "enum" in field or "const" in field:
        return ", ".join(f'`"{choice}"`' for choice in field.get("enum", [field.get("const")]))
    match field["type"]:
        case "array":
            exactly = f" of {field['minItems']}" if field.get("minItems") == field.get("maxItems", -1) else ""
            items = kind(field["items"])
            return f"list{exactly}: ({items})" if " or " in items else f"list{exactly}: {items}"
        case "object":
            return "table"
        case "integer":
            return f"whole number{bounds(field)}"
        case "number":
            return f"number{bounds(field)}"
        case "boolean":
            return "`true`, `false`"
        case _:
            return "text"


def bounds(field: Mapping[str, Any]) -> str:
    """The limits of a number, as `` from 1 to 32``."""
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    lower = f" from {low:,}" if low is not None else f" above {above:,}" if above is not None else ""
    return lower + (f" to {high:,}" if high is not None else f" below {below:,}" if below is not None else "")


def may_change() -> str:
    """The settings that a study may be resumed with."""
    return ", ".join(f"`{key}`" for key in sorted(config.MAY_CHANGE)) + "."


def search_presets() -> str:
    """A table of the sizes of every preset of the search."""
    fields = {
        "population": "population_size", "parents": "parents", "mutations": "mutation", "crossovers": "crossover",
        "mutation_probability": "mutation_probability", "stage_one_generations": "stage_one_generations",
    }  # fmt: skip
    lines = ["| | " + " | ".join(f"`{name}`" for name in PRESETS) + " |", "|---" * (len(PRESETS) + 1) + "|"]
    for setting, field in fields.items():
        lines.append(f"| `{setting}` | " + " | ".join(str(getattr(p, field)) for p in PRESETS.values()) + " |")
    return "\n".join(lines)


# Commands


def commands() -> str:
    """Every command with its arguments and options, as the code declares them."""
    lines: list[str] = []
    for path, command, context in walk(typer.main.get_command(app), typer.Context, "adopt"):
        lines += [f"### `{path}`", "", cell((command.help or "").partition("\b")[0]), ""]
        records = [record for option in command.params if (record := option.get_help_record(context))]
        if records:
            lines += ["| option | |", "|---|---|", *(option_row(*record) for record in records), ""]
    return "\n".join(lines).rstrip()


def option_row(names: str, text: str) -> str:
    """An option's row; one that may be given several times shows it."""
    shown = cell(names.replace("<list[str]>", "<str> …"))
    return f"| `{shown}` | {cell(text)} |"


def walk(command: Any, context_of: Callable[..., Any], path: str, parent: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """(words, command, context) of every command that does something by itself, the groups' own options too."""
    context = context_of(command, info_name=path.rpartition(" ")[2], parent=parent)
    below = getattr(command, "commands", {})
    if not below or command.params:
        yield path, command, context
    for name, member in below.items():
        yield from walk(member, context_of, f"{path} {name}", context)


def cell(text: str) -> str:
    """Text as one line of a Markdown table, with RST's marks of code turned into Markdown's."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


# Studies and solvers


def presets(bundled: bool) -> str:
    """A table of the presets whose model is bundled, or of the others."""
    lines = ["| preset | |", "|---|---|"]
    for name in config.presets():
        study = config.load_preset(name)
        if (study.model.source in config.BUNDLED) == bundled:
            lines.append(f"| `{name}` | {study.description} |")
    return "\n".join(lines)


def solvers() -> str:
    """A table of what each solver costs and where else its steps exist."""
    lines = ["| solver | network evaluations of K steps | same steps in diffusers | in ComfyUI |", "|---|---|---|---|"]
    for name in SOLVERS:
        diffusers = "yes" if name in RECIPES else "no"
        comfy, note = SAMPLERS.get(name, ("", ""))
        comfy = f"`{comfy}`{', approximately' if note.startswith('approximately') else ''}" if comfy else "no"
        lines.append(f"| `{name}` | {formula(name)} | {diffusers} | {comfy} |")
    return "\n".join(lines)


def formula(solver: str) -> str:
    """Network evaluations by the number of steps, in both conventions of the last one."""

    def linear(final: Final) -> str:
        few, more = (evaluations(solver, steps, final) for steps in (4, 8))
        slope = (more - few) // 4
        rest = few - 4 * slope
        sign = "+" if rest > 0 else "-"
        return f"{slope if slope > 1 else ''}K" + (f" {sign} {abs(rest)}" if rest else "")

    same, other = linear("zero"), linear("sigma_min")
    return same if same == other else f'{same}; {other} with `final = "sigma_min"`'


PARTS: dict[str, Callable[[], str]] = {
    "settings": lambda: settings("StudyConfig"),
    "settings model": lambda: settings("ModelConfig"),
    "settings sampling": lambda: settings("SamplingConfig"),
    "settings search": lambda: settings("SearchConfig"),
    "settings score": lambda: settings("ScoreConfig"),
    "commands": commands,
    "may change": may_change,
    "search presets": search_presets,
    "presets bundled": lambda: presets(bundled=True),
    "presets others": lambda: presets(bundled=False),
    "solvers": solvers,
    "capped solvers": lambda: ", ".join(f"`{name}`" for name in CAPPED),
    "results": tables.studies,
    "results layers": tables.layers,
    "results machinery": tables.facts,
    "results costs": tables.costs,
    "results settings": tables.settings,
    "demo": tables.printed,
    "rivals": lambda: rival_text.short(rival_text.result()),
    "rivals in full": lambda: rival_text.full(rival_text.result()),
}
"""Name -> the Markdown that stands between its marks."""


def generated(page: str) -> str:
    """A page with all of its parts written again (KeyError for the mark of a part that does not exist)."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found['name']]()}\n{found[4]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(generated(path.read_text(encoding="utf-8")), encoding="utf-8")
