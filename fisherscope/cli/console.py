"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def complain(label: str, message: str, *, color: str = "red") -> None:
    """Write a labelled message to stderr, whole and unwrapped so that it can be searched for."""
    typer.secho(f"{label}: ", fg=color, bold=True, nl=False, err=True)
    typer.echo(message, err=True)


def note(message: str) -> None:
    """Say on stderr what is going on."""
    typer.echo(message, err=True)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, lines: bool = False
) -> None:
    """Print a table to stdout, with lines between rows if asked. Nothing in the cells is markup."""
    data = [list(row) for row in rows]
    shown = Table(
        title=Text(title), title_justify="left", title_style="bold", header_style="bold", show_lines=lines
    )
    for index, column in enumerate(columns):
        numeric = bool(data) and all(isinstance(row[index], int | float) for row in data)
        shown.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in data:
        shown.add_row(*(Text(_cell(value)) for value in row))
    Console(file=sys.stdout, highlight=False).print(shown)


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
