"""Showing stores and reports on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fisherscope.cli.console import complain, table
from fisherscope.cli.guard import FAILED
from fisherscope.words import counted, several

if TYPE_CHECKING:
    from fisherscope.analyses import AnalyzeConfig, Outcome
    from fisherscope.instrument.estimate import Estimate
    from fisherscope.report import Report
    from fisherscope.store import ContributionStore


def show_store(store: ContributionStore) -> None:
    """One line per task: samples, tokens, loss, truncation; a warning where samples were cut."""
    rows: list[tuple[object, ...]] = []
    for task in store.tasks:
        samples = store.samples(task)
        cut, lost = int((samples["truncated"] > 0).sum()), int(samples["truncated"].sum())
        tokens = int(samples["tokens"].sum())
        rows.append((task, len(samples), tokens, float(samples["loss"].sum()) / tokens, cut))
        if cut:
            complain(
                "warning",
                f"task {task!r}: {cut} of {counted(len(samples), 'sample')} {several(cut, 'was', 'were')} "
                f"cut at --max-length; {counted(lost, 'token')} {several(lost, 'is', 'are')} gone",
                color="yellow",
            )
    table(str(store.path), ["task", "samples", "loss-bearing tokens", "nats per token", "cut"], rows)


def show_estimate(estimate: Estimate) -> None:
    """Bytes and seconds of a planned collection."""
    table("the collection would take", ["what", "how much"], estimate.rows())


def show_description(facts: dict[str, Any]) -> None:
    """What :func:`fisherscope.store.inspect.describe` found: tasks, quantities, bytes, origin."""
    tasks = facts["tasks"]
    table(
        facts["path"],
        ["task", "samples", "sealed", "complete", "in F"],
        [
            (name, t["samples"], t["committed"], "yes" if t["complete"] else "no", t["aggregated"])
            for name, t in tasks.items()
        ],
    )
    layout = facts["layout"]
    weights = counted(layout["entries"], "weight")
    heads = f"heads {_list(layout['heads'])}, key/value heads {_list(layout['kv_heads'])}"
    table(
        "what is stored",
        ["quantity", "extent"],
        [
            (
                "model",
                f"{facts['model_type']}, {weights} in {counted(layout['parameters'], 'parameter')}",
            ),
            ("attention", f"{counted(layout['attention_layers'], 'layer')}, {heads}"),
            (
                "instrumented",
                f"{counted(len(facts['parameters']), 'parameter')}, {counted(facts['groups'], 'group')}",
            ),
            ("F", f"{facts['fisher_shape']}, normalization {facts['normalization']}"),
            ("gradients", facts["gradients"]),
            *(
                (f"error in {task}", f"median {error['median']:.2g}, worst {error['worst']:.2g} (low rank)")
                for task, error in facts["encoding_errors"].items()
            ),
            *_probe(facts["probe"]),
            *((f"proofs of {task}", found["in_words"]) for task, found in facts["proofs"].items()),
        ],
    )
    table(
        "sizes",
        ["kind", "bytes"],
        [(kind, number) for kind, number in facts["bytes"].items() if number],
    )
    table("made by", ["what", "value"], [(key, str(value)) for key, value in facts["provenance"].items()])


def _probe(probe: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the store knows its model by, in words."""
    if probe is None:
        return []
    samples, where = ", ".join(map(str, probe["samples"])), ", ".join(map(str, probe["environment"].values()))
    if not probe["repeats"]:
        return [("known by", f"its digests: the objective does not repeat itself ({where})")]
    words = (
        f"losses and gradient norms of {samples}, to {probe['tolerance']:.0e} on the same machine and to "
        f"{probe['tolerance_elsewhere']:.1g} elsewhere ({where})"
    )
    return [("known by", words)]


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def show_report(report: Report) -> None:
    """One row per analysis: what came of it, in words; and what to know before using the numbers."""
    rows = [(name, *_status(outcome)) for name, outcome in report.outcomes.items()]
    table("analyses", ["analysis", "status", "in words"], rows, lines=True)
    notes = {note: name for name, result in report.items() for note in result.warnings}
    for text, name in notes.items():
        complain("warning", f"{name}: {text}", color="yellow")


def check_report(out: Path, option: str) -> None:
    """Refuse a place for a report before anything is done that takes long.

    Raises:
        typer.BadParameter: it is a file that is no page, or a directory of other things.
    """
    from fisherscope.report import check_target

    try:
        check_target(out, only_reports=True)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def analyze_and_save(
    store: ContributionStore | Path,
    out: Path,
    analyses: Sequence[str] | None = None,
    config: AnalyzeConfig | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Analyze a store, show what came of it, and write the report; its page is the last line printed.

    ``out`` was looked at before: see :func:`check_report`.

    Raises:
        typer.BadParameter: no such analysis or task.
        typer.Exit: with 1, because an analysis failed; the report is written all the same.
    """
    from fisherscope.report import analyze

    try:
        report = analyze(store, analyses, config, quiet=quiet)
    except ValueError as error:  # what analyses raise is kept in the report: this is about the options
        raise typer.BadParameter(str(error)) from error
    saved = report.save(out)
    show_report(report)
    if failed := list(report.failed):
        complain("error", f"failed: {', '.join(failed)}; the report shows each error in its section")
    typer.echo(str(saved / "report.html" if saved.is_dir() else saved))
    if failed:
        raise typer.Exit(FAILED)


def _status(outcome: Outcome) -> tuple[str, str]:
    from fisherscope.analyses import Failed, Skipped

    if isinstance(outcome, Failed):
        return "failed", outcome.error
    if isinstance(outcome, Skipped):
        return "skipped", outcome.reason
    return "ok", outcome.summary()
