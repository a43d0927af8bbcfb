"""``fisherscope verify``."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.guard import FAILED, guarded


@guarded
def verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a store, such as run.fs.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Names, sizes and journals only; the shards are not read.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    debug: opt.Debug = False,
) -> None:
    """Check that everything that was committed to a store is there, byte for byte.

    Every file is read once and compared with its checksums. Whatever is missing, damaged or contradicts the
    rest is listed, with the shard, the dataset and where its bytes are; then the exit code is 1. What an
    interrupted run left behind is noted, and is no damage.

    Example:
        fisherscope verify run.fs
    """
    del debug
    from fisherscope import store as stores

    with _progress_bar() as progress:
        found = stores.verify(store, quick=quick, progress=progress)
    if json:
        typer.echo(json_module.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        typer.echo(found.summary())
    if not found.ok:
        raise typer.Exit(FAILED)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Bytes, speed and time left on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
