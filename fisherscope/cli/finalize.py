"""``fisherscope finalize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.guard import guarded


@guarded
def finalize(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a store, such as run.fs.")],
    debug: opt.Debug = False,
) -> None:
    """Merge a store's small shards into large ones, and the aggregates of its ranks into one.

    Nothing that can be read changes. A crash leaves the store as it was before or as it is after, and it can
    be resumed and extended as ever.

    Example:
        fisherscope finalize run.fs
    """
    del debug
    from fisherscope import store as stores

    typer.echo(f"{store}: {stores.finalize(store)}")
