"""``adopt studies``: the studies of a database; ``adopt storage``: the database itself."""

from __future__ import annotations

import typer
from rich.table import Table

from autodiffusion_optuna.commands.output import StorageUrl, out

studies_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, help="Studies of the database.")
storage_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The database itself.")


@studies_app.callback()
def default(context: typer.Context, storage: StorageUrl = None) -> None:
    """List, rename, copy or delete studies; alone it lists them."""
    if context.invoked_subcommand is None:
        list_all(storage)


@studies_app.command("list")
def list_all(storage: StorageUrl = None) -> None:
    """List the presets that ship with adopt and the studies in the database."""
    from autodiffusion_optuna.report import list_studies, peek_storage
    from autodiffusion_optuna.storage import storage_url

    table = Table(box=None, pad_edge=False)
    for column in ("study", "preset", "finished", "best", "what it is"):
        table.add_column(column, overflow="fold")
    for line in list_studies(peek_storage(storage_url(storage))):
        finished = "-" if line.finished is None else f"{line.finished} of {line.budget}"
        best = "-" if line.best is None else f"{line.best:.4g}"
        table.add_row(line.name, "yes" if line.preset else "", finished, best, line.description)
    out.print(table)


@storage_app.command()
def upgrade(storage: StorageUrl = None) -> None:
    """Bring the database's tables to the version that the installed Optuna needs."""
    from autodiffusion_optuna.storage import storage_url, upgrade_storage

    out.print(upgrade_storage(storage_url(storage)))
