"""``fisherscope inspect``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.guard import guarded
from fisherscope.cli.results import show_description


@guarded
def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a store, such as run.fs.")],
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    debug: opt.Debug = False,
) -> None:
    """Show what a store holds: tasks, samples, quantities, sizes, and how it was made.

    Example:
        fisherscope inspect run.fs --json
    """
    del debug
    from fisherscope.store.inspect import describe

    described = describe(store)
    if json:
        typer.echo(json_module.dumps(described, indent=2, allow_nan=False))
    else:
        show_description(described)
