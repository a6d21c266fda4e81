"""What every command shares: consoles, options, and the tables that several of them print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.storage.url import storage_option

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.results.summary import StudySummary
    from autodiffusion_optuna.storage.study_storage import StudyStorage
    from autodiffusion_optuna.study.components import StudyComponents

NAME_WIDTH = 24
"""Longest name of a candidate that a narrow terminal keeps on one line."""
PIPE_WIDTH = 160  # of tables that go to a file or another program
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

StudyName = Annotated[str, typer.Option("--study", help="A study in the database.")]
StudyOption = Annotated[str | None, typer.Option("--study", help="A study in the database.")]
ResultOption = Annotated[Path | None, typer.Option("--result", help="A result that adopt export --format json wrote.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, as in the study file.")]
StorageUrl = Annotated[
    str | None,
    typer.Option("--storage", help="Database URL or SQLite file; default $ADOPT_STORAGE, else sqlite:///adopt.db."),
]
Places = Annotated[
    list[str] | None, typer.Option("--set", help="Where a file of the study is now: model.source=PATH and the like.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Allow files that contain code (TorchScript weights).")]

EXIT_INTERRUPTED = 130


def say(text: str) -> None:
    """Print a line that is never broken: commands must stay whole when copied."""
    out.print(text, soft_wrap=True)


def warn(warnings: list[str]) -> None:
    """Print warnings on stderr, a line each."""
    for warning in warnings:
        err.print(f"warning: {warning}")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def existing(name: str, url: str) -> tuple[StudyStorage, optuna.Study]:
    """The database at ``url`` and a study in it that adopt made (StorageError, StudyError)."""
    from autodiffusion_optuna.storage.database import open_storage
    from autodiffusion_optuna.storage.studies import load_study

    database = open_storage(url, create=False)
    return database, load_study(database, name)


def load_components(
    name: str, url: str, trust: bool, places: list[str] | None = None, overrides: list[str] | None = None
) -> tuple[optuna.Study, StudyComponents]:
    """A study of the database with its components, built from the config it was run with (AdoptError children).

    ``places``: what the user set, ``OF_THIS_HOST`` alone. ``overrides``: of the command's own.
    """
    from autodiffusion_optuna.config import OF_THIS_HOST, parse_config
    from autodiffusion_optuna.storage.studies import require_files, stored_batch, stored_config, stored_unit_costs
    from autodiffusion_optuna.study import components, lifecycle

    for place in places or []:
        if place.partition("=")[0].strip() not in OF_THIS_HOST:
            raise ConfigError(
                f"--set {place!r}: a study keeps its own settings; here --set takes {', '.join(OF_THIS_HOST)}"
            )
    study = existing(name, url)[1]
    config = parse_config(stored_config(study).model_dump(mode="json"), [*(places or []), *(overrides or [])])
    require_files(study, config)
    built = components.build(config, trust=trust, unit_costs=stored_unit_costs(study), batch=stored_batch(study))
    lifecycle.check_same(built, study)
    return study, built


def print_result(study: optuna.Study, url: str, *, warned: bool = True) -> None:
    """What a finished run prints: the table, and the commands that come next.

    ``warned``: whether it printed the study's stored warnings when it began.
    """
    from autodiffusion_optuna.results.summary import read_summary

    summary = read_summary(study)
    print_table(summary)
    tail = storage_option(url)
    warn(summary.found_doubtful(tail) if warned else summary.warnings(tail))
    name, more = summary.config.name, summary.config.search.trials * 2
    say("\nnext:")
    for command, why in (
        (f"adopt show --study {name}{tail}", "history, evaluations saved, seconds by phase"),
        (f"adopt sample --study {name} --out {name}.png{tail}", "see the difference"),
        (f"adopt export --study {name}{tail}", "apply it to the model with diffusers"),
        (f"adopt run --study {name} --set search.trials={more}{tail}", "search on"),
    ):
        say(f"  {command}    # {why}")


def print_table(summary: StudySummary) -> None:
    """The best found and the baselines: value on the search's noise, value on held-out noise, cost and timesteps.

    A value of another number of images than its column's carries its own.
    """
    from autodiffusion_optuna.results.summary import banks_of

    if summary.best is None:
        say(f"study {summary.config.name}: no candidate is finished yet")
        return
    rows, size, best = summary.rows(), summary.held_out_size, summary.best.candidate
    table = Table(box=None, pad_edge=False)
    table.add_column("candidate", overflow="fold", min_width=min(max(len(row.name) for row in rows), NAME_WIDTH))
    for column in (
        f"{summary.metric}, search\n{summary.config.score.images:,} images",
        f"held-out noise, 95 %\n{banks_of(size)} images" if size else "held-out noise",
        "cost",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("settings", "timesteps") if best.settings else ("timesteps",):
        table.add_column(column, overflow="fold")
    for row in rows:
        interval = "-" if row.held_out is None else f"{row.held_out.mean:.4g} ± {row.held_out.half_width:.2g}"
        if row.held_out is not None and row.held_out.size != size:
            interval += f" ({banks_of(row.held_out.size)})"
        cells = [row.name, "-" if row.value is None else f"{row.value:.4g}", interval, f"{row.cost:.2f}"]
        if best.settings:
            cells.append(row.settings)
        table.add_row(*cells, row.timesteps)
    out.print(table)
    if any(best.skips):
        say("\nlayers skipped by the best candidate:")
        for timestep, skipped in zip(best.timesteps, best.skip_names(summary.units), strict=True):
            say(f"  {timestep:>5}  {', '.join(skipped) or '-'}")


def print_facts(summary: StudySummary) -> None:
    """Numbers of a study and its history, line by line."""
    data = summary.to_json()
    run, saved, seconds = data["evaluations"]["run"], data["evaluations"]["saved"], data["seconds"]
    say(
        f"\n{data['finished']} of {data['budget']} candidates finished, generation {data['generation']}, "
        f"stage {data['stage']}, solver {summary.solver_names}, {data['images']:,} images a candidate, "
        f"reference {summary.reference_name}",
    )
    say(f"network evaluations (an image each): {run:,} run, {saved:,} saved ({saved / max(run + saved, 1):.0%})")
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "total")
    say(f"seconds: {phases}, total {seconds['total']:.1f}")
    say(f"\ngeneration  stage  best so far, search noise ({summary.value_name})")
    for generation, stage, value in summary.best_by_generation():
        say(f"{generation:>10}  {stage:>5}  {'-' if value is None else f'{value:.4g}'}")
