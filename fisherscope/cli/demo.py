"""``fisherscope demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherscope.cli import options as opt
from fisherscope.cli.console import note
from fisherscope.cli.guard import guarded
from fisherscope.cli.loading import load_model, load_tokenizer
from fisherscope.cli.results import analyze_and_save, check_report, show_store


@guarded
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Receives run.fs/ and report/.")
    ] = Path("fisherscope-demo"),
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """From nothing to a report, with a small trained model that comes with the package.

    Three tasks: `math` (two-digit sums), `code` (look-ups in short programs) and `math_flipped` (the sums of
    `math` with contradicting answers: a conflict that the report finds). No network, about a minute.

    Example:
        fisherscope demo --out my-demo
    """
    del debug
    from fisherscope.demo import model_path, task_files
    from fisherscope.instrument.data import read_jsonl
    from fisherscope.instrument.scope import wrap

    check_report(out / "report", "--out")
    if not quiet:
        note(f"collecting the demo model into {out / 'run.fs'}")
    path = str(model_path())
    model = load_model(path, device="cpu")
    model.config.name_or_path = "fisherscope demo model"  # reports name it, and not where it is installed
    scope = wrap(model, load_tokenizer(path))
    tasks = {name: read_jsonl(file) for name, file in task_files().items()}
    out.mkdir(parents=True, exist_ok=True)
    store = scope.collect(tasks, out / "run.fs", quiet=quiet)
    show_store(store)
    analyze_and_save(store, out / "report", quiet=quiet)
