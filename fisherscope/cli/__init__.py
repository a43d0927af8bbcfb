"""The command line: one file per command. Heavy libraries are imported by the commands, not here."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from fisherscope.cli import adapters, analyze, calibrate, collect, demo, estimate, finalize, inspect, verify

__all__ = ["app", "run"]

app = typer.Typer(
    name="fisherscope",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(estimate.estimate)
app.command()(collect.collect)
app.command()(analyze.analyze)
app.command()(calibrate.calibrate)
app.command()(inspect.inspect)
app.command()(verify.verify)
app.command()(finalize.finalize)
app.add_typer(adapters.app, name="adapters")


def _show_version(value: bool) -> None:
    if value:
        from fisherscope.versions import __version__

        typer.echo(f"fisherscope {__version__}")
        raise typer.Exit


@app.callback(epilog="Begin with `fisherscope demo`: it needs no model, no data and no network.")
def _fisherscope(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """See which attention heads matter to which task, and where tasks collide.

    **collect** runs a model over tasks and stores every sample's gradients; **analyze** turns the store into
    a report and needs no model. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
    """
    del version


def run() -> None:
    """Read the command line and do what it says."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # samples, names and the help hold characters that an ASCII terminal or pipe cannot show
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="fisherscope")
