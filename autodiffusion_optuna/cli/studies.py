"""``adopt studies``: the studies of a database; ``adopt storage``: the database itself."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from autodiffusion_optuna.cli.fitted import print_fitted
from autodiffusion_optuna.cli.output import StorageUrl, StudyName, err, existing, out, say, warn
from autodiffusion_optuna.errors import ConfigError, program
from autodiffusion_optuna.storage.url import hide_password, storage_url

if TYPE_CHECKING:
    from autodiffusion_optuna.results.status import PresetLine, StudyLine

NewName = Annotated[str, typer.Option("--to", help="The new name.")]
Force = Annotated[bool, typer.Option("--force", help="Also where workers seem to be running it.")]

studies_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, help="Studies of the database.")
storage_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The database itself.")


@studies_app.callback()
def default(context: typer.Context, storage: StorageUrl = None) -> None:
    """List, rename, copy or delete studies; alone it lists them."""
    if context.invoked_subcommand is None:
        list_all(storage)
    elif storage is not None:
        name = context.invoked_subcommand
        raise ConfigError(f"--storage goes behind the command: {program()} studies {name} --storage URL")


@studies_app.command("list")
def list_all(storage: StorageUrl = None) -> None:
    """List the studies in the database, and the presets."""
    from autodiffusion_optuna.results.status import list_presets, list_studies
    from autodiffusion_optuna.storage.studies import find_storage

    url = storage_url(storage)
    database = find_storage(url)
    begun = [] if database is None else list_studies(database)
    if begun:
        _print_begun(begun)
    else:
        say(f"no study in {hide_password(url)} yet")
    own = {line.name for line in begun}
    left = [line for line in list_presets() if line.name not in own]
    for ready, title in (
        (True, f"presets that run as they are, with {program()} run --study NAME"),
        (False, "presets that need files or weights of yours, see each study file"),
    ):
        _print_presets(title, [line for line in left if (not line.needs) == ready])


def _print_begun(lines: list[StudyLine]) -> None:
    table = _table("study", "candidates", "best", "what it is")
    for line in lines:
        best = "none yet" if line.best is None else f"{line.best:.4g} ({line.measure})"
        table.add_row(line.name, line.state, best, line.description)
    print_fitted(out, table)


def _print_presets(title: str, lines: list[PresetLine]) -> None:
    if not lines:
        return
    say(f"\n{title}:")
    table = _table("preset", "what it is", header=False)
    for line in lines:
        table.add_row(f"  {line.name}", line.description)
    print_fitted(out, table)


def _table(name: str, *others: str, header: bool = True) -> Table:
    """Names stay whole on any terminal; all else is folded."""
    table = Table(box=None, pad_edge=False, show_header=header)
    table.add_column(name, no_wrap=True)
    for column in others:
        table.add_column(column, overflow="fold")
    return table


@studies_app.command()
def rename(study: StudyName, new: NewName, storage: StorageUrl = None, force: Force = False) -> None:
    """Give a study another name. Its trials, pictures, notes and plots stay as they are."""
    from autodiffusion_optuna.storage.database import open_storage
    from autodiffusion_optuna.storage.manage import rename_study

    rename_study(open_storage(storage_url(storage), create=False), study, new, force=force)
    say(f"renamed {study} to {new}")


@studies_app.command()
def copy(
    study: StudyName,
    new: NewName,
    storage: StorageUrl = None,
    target: Annotated[
        str | None, typer.Option("--to-storage", help="Database of the copy; default the same one.")
    ] = None,
    force: Force = False,
) -> None:
    """Copy a study with its pictures. Within the database or to another; the copy goes on like the original."""
    from autodiffusion_optuna.storage.database import open_storage
    from autodiffusion_optuna.storage.manage import copy_study

    source = open_storage(storage_url(storage), create=False)
    url = None if target is None else storage_url(target)
    opened = None if url is None else partial(open_storage, url)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(f"copying {study}")
        copy_study(
            source,
            study,
            new,
            opened,
            force=force,
            on_copied=lambda done, total: progress.update(task, completed=done, total=total),
        )
    say(f"copied {study} to {new}" + ("" if url is None else f" in {hide_password(url)}"))


@studies_app.command()
def delete(
    study: StudyName,
    storage: StorageUrl = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also where workers seem to be running it, or its pictures must stay.")
    ] = False,
) -> None:
    """Delete a study with its trials. And the pictures that are its alone."""
    from autodiffusion_optuna.storage.manage import delete_study
    from autodiffusion_optuna.storage.trials import count_finished

    database, found = existing(study, storage_url(storage))
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"deleting study {study!r} needs --yes where there is no terminal to ask on")
        typer.confirm(f"Delete study {study} with {count_finished(found)} finished trials?", abort=True)
    deleted = delete_study(database, study, force=force)
    say(f"deleted {study}" + (f" and {deleted.removed} pictures" if deleted.removed else ""))
    if deleted.left:
        warn([f"{deleted.why}; pictures that stay: {' '.join(deleted.left)}"])


@storage_app.command()
def upgrade(storage: StorageUrl = None) -> None:
    """Bring the database to the version that this Optuna needs."""
    from autodiffusion_optuna.storage.database import upgrade_storage

    out.print(upgrade_storage(storage_url(storage)))
