"""``adopt init``: look at a model, and write a study file that runs."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autodiffusion_optuna.cli.output import Overrides, Trust, say, warn
from autodiffusion_optuna.cli.places import check_out
from autodiffusion_optuna.errors import ConfigError, program

if TYPE_CHECKING:
    from autodiffusion_optuna.study.draft import Draft


def init(
    model: Annotated[str, typer.Argument(help="A bundled model, a diffusers folder, a hub id or a checkpoint.")],
    images: Annotated[
        Path | None, typer.Option("--images", help="Images like those it was trained on: a folder, zip or npz.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Of a text-to-image model: txt, csv, jsonl or COCO captions json.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Published weights of the extractor inception or clip.")
    ] = None,
    path: Annotated[Path | None, typer.Option("--out", help="File to write; default NAME.toml here.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the study; default the model's.")] = None,
    overrides: Overrides = None,
    trust: Trust = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Look at a model and write a study file for it.

    Each setting stands there with its reason.
    """
    name = _name(name, model, path)
    path = path or Path(f"{name}.toml")
    if path.suffix != ".toml":
        raise ConfigError(f"--out {str(path)!r}: a study file ends in .toml")
    check_out(path, "the study file", "study.toml", force=force)
    for option, given in (("--images", images), ("--prompts", prompts), ("--weights", weights)):
        if given is not None and not given.exists():
            raise ConfigError(f"{option} {str(given)!r} does not exist; give the path of what is there")
    from autodiffusion_optuna.study.suggest import Wish, draft_study

    wish = Wish(model, name, path, images, prompts, weights, tuple(overrides or ()), trust)
    draft = draft_study(wish)
    try:
        path.write_text(draft.text(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; give another --out") from None
    _report(draft, path)


def _report(draft: Draft, path: Path) -> None:
    """What was found, what is left to do, and the commands that come next."""
    width = max(map(len, draft.facts))
    for fact, value in draft.facts.items():
        say(f"{fact:<{width}}  {value}")
    warn(list(draft.remarks))
    say(f"wrote {path}")
    if draft.to_fill_in:
        say(f"fill in there: {', '.join(draft.to_fill_in)}")
    file = shlex.quote(str(path))
    say("\nnext:")
    say(f"  {program()} run --study {file} --dry-run    # what the search will cost")
    say(f"  {program()} run --study {file}")


def _name(given: str | None, model: str, path: Path | None) -> str:
    """Name of the study: as given, else of the file to write, else of the model (ConfigError where it is none)."""
    from autodiffusion_optuna.config import NAME_PATTERN

    if given is None:
        plain = model.partition("@")[0].removeprefix("adm:").rstrip("/")
        own = Path(os.path.abspath(plain)) if plain.strip("./") == "" else Path(plain)
        stem = path.stem if path else own.stem if own.suffix in (".pt", ".pth", ".safetensors") else own.name
        given = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "study"
    if not re.fullmatch(NAME_PATTERN, given):
        raise ConfigError(f"--name {given!r}: use letters, digits, '.', '_' and '-', a letter or digit first")
    return given
