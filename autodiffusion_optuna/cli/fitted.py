"""Tables of which no terminal cuts anything off."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

FOLDED = 12
"""Fewest characters that a column of folded text is given beside columns that stay whole."""
GAP = 2  # blanks between columns without a box


def print_fitted(console: Console, table: Table) -> None:
    """Print a table without a box, as wide as the console at most.

    Where it is wider, texts of columns with ``no_wrap`` stay whole, their headers are broken between words, and the
    other columns are folded. Where that leaves these no room, they go below each row, and where that is too wide as
    well, each row becomes a block of lines, a column on each.
    """
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table)
        return
    whole = [column for column in table.columns if column.no_wrap]
    needed = sum(map(_width, whole)) + GAP * (len(whole) - 1)
    if needed > console.width:
        _print_blocks(console, table)
    elif needed + (FOLDED + GAP) * (len(table.columns) - len(whole)) > console.width:
        _print_folded_below(console, table)
    else:
        for column in whole:
            column.header = "\n".join(_header(column))
        console.print(table)


def _width(column: Column) -> int:
    """Characters that a column needs whose header may be broken between words."""
    return max((len(text) for text in [*_texts(column), *str(column.header).split()]), default=0)


def _texts(column: Column) -> list[str]:
    return [str(cell) for cell in column.cells]


def _header(column: Column) -> list[str]:
    """Lines of a header that is as narrow as its column."""
    width = _width(column)
    return [part for line in str(column.header).split("\n") for part in textwrap.wrap(line, width)]


def _print_folded_below(console: Console, table: Table) -> None:
    """Columns that stay whole as a table; the text of the others, indented, below each row."""
    whole = [column for column in table.columns if column.no_wrap]
    height = max(len(_header(column)) for column in whole)
    headers = [[""] * (height - len(lines)) + lines for lines in map(_header, whole)]
    for texts in zip(*headers, strict=True):
        console.print(_line(whole, texts), soft_wrap=True)
    others = [column for column in table.columns if not column.no_wrap]
    below = zip(*map(_texts, others), strict=True) if others else [()] * table.row_count
    for texts, folded in zip(zip(*map(_texts, whole), strict=True), below, strict=True):
        console.print(_line(whole, texts), soft_wrap=True)
        _print_indented(console, ": ".join(text for text in folded if text))


def _line(columns: Sequence[Column], texts: Sequence[str]) -> str:
    padded = (
        text.rjust(_width(column)) if column.justify == "right" else text.ljust(_width(column))
        for column, text in zip(columns, texts, strict=True)
    )
    return (" " * GAP).join(padded).rstrip()


def _print_blocks(console: Console, table: Table) -> None:
    """Each row: its first cell, and below it ``header: text`` of the others that say anything."""
    headers = [" ".join(str(column.header).split()) for column in table.columns]
    for texts in zip(*map(_texts, table.columns), strict=True):
        console.print(texts[0], soft_wrap=True)
        for header, text in zip(headers[1:], texts[1:], strict=True):
            if text not in ("", "-"):
                _print_indented(console, f"{header}: {text}" if header else text)


def _print_indented(console: Console, text: str) -> None:
    indent = " " * GAP
    for line in textwrap.wrap(text, console.width, initial_indent=indent, subsequent_indent=2 * indent):
        console.print(line, soft_wrap=True)
