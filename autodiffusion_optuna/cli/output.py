"""What every command shares: consoles, options, and the tables that several of them print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from autodiffusion_optuna.errors import ConfigError

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.results.summary import StudySummary
    from autodiffusion_optuna.storage.database import StudyStorage
    from autodiffusion_optuna.study.components import StudyComponents

NAME_WIDTH = 24
"""Longest name of a schedule that a narrow terminal keeps on one line."""
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
    """A study of the database with its parts built from the config it was run with (AdoptError children).

    ``places``: what the user set, ``OF_THIS_HOST`` alone. ``overrides``: of the command's own.
    """
    from autodiffusion_optuna.config import OF_THIS_HOST, parse_config
    from autodiffusion_optuna.evaluation.allocator import keep_freed_memory
    from autodiffusion_optuna.storage.studies import require_files, stored_batch, stored_config, stored_unit_costs
    from autodiffusion_optuna.study import components, lifecycle

    for place in places or []:
        if place.partition("=")[0].strip() not in OF_THIS_HOST:
            raise ConfigError(
                f"--set {place!r}: a study keeps its own settings; here --set takes {', '.join(OF_THIS_HOST)}"
            )
    keep_freed_memory()
    found = existing(name, url)[1]
    config = parse_config(stored_config(found).model_dump(mode="json"), [*(places or []), *(overrides or [])])
    require_files(found, config)
    parts = components.build(config, trust=trust, unit_costs=stored_unit_costs(found), batch=stored_batch(found))
    lifecycle.check_same(parts, found)
    return found, parts


def print_result(study: optuna.Study, url: str, *, said_before: bool = True) -> None:
    """What a finished run prints: the table, and the commands that come next.

    ``said_before``: whether it printed the study's stored warnings when it began.
    """
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.storage.url import storage_option

    report = read_summary(study)
    print_table(report)
    tail = storage_option(url)
    warn(report.found_doubtful(tail) if said_before else report.warnings(tail))
    name, more = report.config.name, report.config.search.trials * 2
    say("\nnext:")
    for command, why in (
        (f"adopt show --study {name}{tail}", "history, evaluations saved, seconds by phase"),
        (f"adopt sample --study {name} --out {name}.png{tail}", "see the difference"),
        (f"adopt export --study {name}{tail}", "apply it to the model with diffusers"),
        (f"adopt run --study {name} --set search.trials={more}{tail}", "search on"),
    ):
        say(f"  {command}    # {why}")


def print_table(report: StudySummary) -> None:
    """Schedules from best to worst: timesteps, value on the search's noise, value on held-out noise.

    A value of another number of images than its column's carries its own.
    """
    from autodiffusion_optuna.results.summary import banks_of

    if report.best is None:
        say(f"study {report.config.name}: no candidate is finished yet")
        return
    size, best = report.held_out_size, report.best
    table = Table(box=None, pad_edge=False, title_justify="left")
    names = [len(row.name) for row in report.rows()]
    table.add_column("schedule", overflow="fold", min_width=min(max(names), NAME_WIDTH))
    for column in (
        f"{report.metric}, search\n{report.config.score.images:,} images",
        f"held-out noise, 95 %\n{banks_of(size)} images" if size else "held-out noise",
        "cost",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    searched = bool(best.candidate.settings)
    if searched:
        table.add_column("settings", overflow="fold")
    table.add_column("timesteps", overflow="fold")
    for row in report.rows():
        shown = "-" if row.value is None else f"{row.value:.4g}"
        interval = "-" if row.held_out is None else f"{row.held_out.mean:.4g} ± {row.held_out.half_width:.2g}"
        if row.held_out is not None and row.held_out.size != size:
            interval += f" ({banks_of(row.held_out.size)})"
        timesteps = " ".join(str(t) for t in row.candidate.timesteps)
        chosen = [", ".join(f"{name} {value}" for name, value in row.candidate.settings)] if searched else []
        table.add_row(row.name, shown, interval, f"{row.cost:.2f}", *chosen, timesteps)
    out.print(table)
    if any(best.candidate.skips):
        _print_skips(report)


def _print_skips(report: StudySummary) -> None:
    assert report.best is not None
    say("\nlayers skipped by the best schedule:")
    names = report.best.candidate.skip_names(report.units)
    for timestep, skipped in zip(report.best.candidate.timesteps, names, strict=True):
        say(f"  {timestep:>5}  {', '.join(skipped) or '-'}")


def print_facts(report: StudySummary) -> None:
    """Numbers of a study and its history, line by line."""
    data = report.to_json()
    run_count, saved = data["evaluations"]["run"], data["evaluations"]["saved"]
    share = saved / max(run_count + saved, 1)
    seconds = data["seconds"]
    solver = ", ".join(report.solver) if isinstance(report.solver, list) else report.solver
    say(
        f"\n{data['finished']} of {data['budget']} candidates finished, generation {data['generation']}, "
        f"stage {data['stage']}, solver {solver}, {data['images']:,} images a candidate, "
        f"reference {report.reference_name}",
    )
    say(f"network evaluations (an image each): {run_count:,} run, {saved:,} saved ({share:.0%})")
    phases = ", ".join(f"{phase} {seconds[phase]:.1f}" for phase in ("network", "features", "distance", "storage"))
    say(f"seconds: {phases}, total {seconds['total']:.1f}")
    say(f"\ngeneration  stage  best so far, search noise ({report.value_name})")
    for generation, stage, value in report.best_by_generation():
        say(f"{generation:>10}  {stage:>5}  {'-' if value is None else f'{value:.4g}'}")
