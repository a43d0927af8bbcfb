"""``fisherscope calibrate``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.analyze import read_config
from fisherscope.cli.console import table
from fisherscope.cli.guard import FAILED, guarded


@guarded
def calibrate(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a store, such as run.fs.")],
    splits: Annotated[
        int, typer.Option("--splits", metavar="R", min=1, help="Random halves of each task.")
    ] = 200,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with options, as in results.json.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Try the conflict tests where nothing is to be found: on random halves of each task.

    A test at level .05 should call something in at most 5 % of the splits. Where one does so far more often,
    its q-values cannot be trusted on this store, and the exit code is 1. `analyze` does it with 20 splits.

    Example:
        fisherscope calibrate run.fs --splits 200
    """
    del debug
    from fisherscope.analyses.conflict import calibrate as run

    settings = None if config is None else read_config(config)
    try:
        found = run(store, settings, splits=splits, quiet=quiet)
    except ValueError as error:  # about the options
        raise typer.BadParameter(str(error)) from error
    if json:
        typer.echo(json_module.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        columns = ["task", "test", "splits", "rejecting", "upper", "chance", "calibrated", "samples"]
        rows = found.frame[columns].assign(
            upper=found.frame["upper"].map("{:.2g}".format),
            chance=found.frame["chance"].map("{:.2g}".format),
            calibrated=found.frame["calibrated"].map({True: "yes", False: "no", None: "not tried"}),
        )
        table(str(store), columns, [*rows.itertuples(index=False, name=None)])
        typer.echo(found.summary())
    if not found.calibrated:
        raise typer.Exit(FAILED)
