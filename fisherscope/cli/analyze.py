"""``fisherscope analyze``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.guard import guarded
from fisherscope.cli.results import analyze_and_save, check_report

if TYPE_CHECKING:
    from fisherscope.analyses import AnalyzeConfig


@guarded
def analyze(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Directory of a store, such as run.fs.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR|PAGE",
            help="Receives report.html, results.json, tables/; or a page.html alone.",
        ),
    ] = Path("report"),
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run this analysis only; repeat for several.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with options, as in results.json.")
    ] = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Turn a store into a report. No model is needed.

    An analysis whose data was not collected is skipped and says what to collect; one that fails shows its
    error in the report, the others go on, and the exit code is 1.

    Example:
        fisherscope analyze run.fs --out report/ --only fisher --only interference
    """
    del debug
    _check_names(only or [])
    check_report(out, "--out")
    analyze_and_save(store, out, only, None if config is None else read_config(config), quiet=quiet)


def _check_names(names: list[str]) -> None:
    from fisherscope.analyses import REGISTRY

    known = REGISTRY.names()
    for name in names:
        if name not in known:
            raise typer.BadParameter(
                f"no analysis {name!r}; there are {', '.join(known)}", param_hint="--only"
            )


def read_config(path: Path) -> AnalyzeConfig:
    """Options of analyses out of a JSON file.

    Raises:
        typer.BadParameter: it cannot be read, or holds something else.
    """
    from fisherscope.analyses import AnalyzeConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--config") from error
    except ValueError as error:
        raise typer.BadParameter(f"{path}: not valid JSON ({error})", param_hint="--config") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path}: not a JSON object of options", param_hint="--config")
    try:
        return AnalyzeConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--config") from error
