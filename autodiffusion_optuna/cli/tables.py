"""The tables of a study's result that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from autodiffusion_optuna.candidate import REUSE, SKIP
from autodiffusion_optuna.cli.fitted import print_fitted
from autodiffusion_optuna.cli.output import out, say

if TYPE_CHECKING:
    from autodiffusion_optuna.results.summary import Row, StudySummary


def print_tables(summary: StudySummary) -> None:
    """The headline, the candidates, the finalists, the best of each searched choice, and the ablation."""
    print_headline(summary)
    print_table(summary)
    print_finalists(summary)
    print_best_by_setting(summary)
    print_ablation(summary)


def print_headline(summary: StudySummary) -> None:
    """One sentence: the best found against uniform timesteps with the same settings; another on how it was chosen."""
    lines = [summary.headline and summary.headline.text(), summary.choice_text]
    for line in lines:
        if line:
            say(line)
    if any(lines):
        say("")


def print_table(summary: StudySummary) -> None:
    """The best found, the baselines and the floors: held-out value, difference, search value, cost and timesteps.

    A value of another number of images than its column's carries its own.
    """
    from autodiffusion_optuna.results.summary import banks_of

    if summary.best is None:
        say(f"study {summary.config.name}: no candidate is finished yet")
        return
    rows, size, best, headline = summary.rows(), summary.held_out_size, summary.best.candidate, summary.headline
    floors = [row for row in (summary.many_steps,) if row is not None]
    against = headline and headline.baseline.name.replace(", ", ",\n")  # several settings make a long name
    table = Table(box=None, pad_edge=False)
    table.add_column("candidate", no_wrap=True)
    for column in (
        f"held-out noise, 95 %\n{banks_of(size)} images" if size else "held-out noise",
        f"difference to\n{against}, 95 %" if against else "difference",
        f"{summary.metric}, search\n{summary.config.score.images:,} images",
        "cost",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("settings", "timesteps") if best.settings else ("timesteps",):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*_cells(summary, row, size), *([row.settings] if best.settings else []), row.timesteps)
    for row in floors:
        table.add_row(*_cells(summary, row, size), *([row.settings] if best.settings else []), "floor of many steps")
    _add_real(table, summary)
    print_fitted(out, table)
    for mode, what in ((SKIP, "skipped"), (REUSE, "reused")):
        names = best.unit_names(summary.units, mode)
        if any(names):
            say(f"\nlayers {what} by the best candidate:")
            for timestep, units in zip(best.timesteps, names, strict=True):
                say(f"  {timestep:>5}  {', '.join(units) or '-'}")


def _cells(summary: StudySummary, row: Row, size: tuple[int, int] | None) -> list[str]:
    """Name, held-out value, difference, search value and cost of a row."""
    from autodiffusion_optuna.results.summary import banks_of

    interval = "-" if row.held_out is None else row.held_out.text
    if row.held_out is not None and row.held_out.size != size:
        interval += f" ({banks_of(row.held_out.size)})"
    difference = summary.difference(row)
    return [
        row.name,
        interval,
        "-" if difference is None else difference.text,
        row.value_text,
        f"{row.cost:.2f}",
    ]


def _add_real(table: Table, summary: StudySummary) -> None:
    """The floor of real images, with what was compared; a line that says why where there is none."""
    from autodiffusion_optuna.results.held_out import significant

    real = summary.real_floor
    if real is None:
        return
    filled = [""] if summary.best and summary.best.candidate.settings else []
    if real.value is None:
        table.add_row("real images", "-", "-", "-", "-", *filled, f"no floor: {real.note}")
        return
    against = "" if real.against is None else f" ({real.against:,})"
    images = f"{significant(real.value)} (1 x {real.images:,})"
    table.add_row("real images", images, "-", "-", "-", *filled, f"floor: {real.note}{against}")


def print_finalists(summary: StudySummary) -> None:
    """Values of the finalists in the search and on validation noise, once one of them has both."""
    from autodiffusion_optuna.results.held_out import significant

    if not summary.finalists.validated:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("finalist", no_wrap=True)
    for noise, images in (("validation", summary.config.validation_images), ("search", summary.config.score.images)):
        table.add_column(f"{summary.metric}, {noise}\n{images:,} images", justify="right", no_wrap=True)
    table.add_column("timesteps", overflow="fold")
    for finalist in summary.finalists.all:
        value = "-" if finalist.validated is None else significant(finalist.validated)
        timesteps = " ".join(map(str, finalist.candidate.timesteps))
        table.add_row(f"trial {finalist.trial.number}", value, significant(finalist.searched), timesteps)
    say("")
    print_fitted(out, table)


def print_best_by_setting(summary: StudySummary) -> None:
    """The best candidate with each solver, and so on for every searched choice."""
    for name, rows in summary.best_by_setting().items():
        table = Table(box=None, pad_edge=False)
        table.add_column(name, no_wrap=True)
        for column in (f"best {summary.metric}, search", "held-out noise, 95 %", "cost"):
            table.add_column(column, justify="right", no_wrap=True)
        for column in ("settings", "timesteps"):
            table.add_column(column, overflow="fold")
        for row in rows:
            _, held_out, _, value, cost = _cells(summary, row, summary.held_out_size)
            table.add_row(row.name, value, held_out, cost, row.settings, row.timesteps)
        say("")
        print_fitted(out, table)


def print_ablation(summary: StudySummary) -> None:
    """Which single change of the best found earned how much."""
    from autodiffusion_optuna.results.held_out import significant
    from autodiffusion_optuna.results.summary import banks_of

    changes = summary.ablation
    if not changes:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("the best found, but", no_wrap=True)
    size = banks_of(changes[0].held_out.size)
    for column in (f"{summary.metric}, held-out\n{size} images", "difference to\nbest found, 95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for change in changes:
        table.add_row(change.name, significant(change.held_out.mean), change.difference.text)
    say("")
    print_fitted(out, table)
