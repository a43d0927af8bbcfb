"""Which tables a section shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from fisherscope.analyses import Result
from fisherscope.analyses.conflict import ConflictResult
from fisherscope.analyses.fisher import FisherResult
from fisherscope.analyses.importance import ImportanceResult
from fisherscope.analyses.interference import InterferenceResult
from fisherscope.analyses.masks import MasksResult
from fisherscope.analyses.overlap import OverlapResult
from fisherscope.report.cells import WHERE, Tables, table
from fisherscope.report.conflict_tables import conflict_tables
from fisherscope.report.markup import Html, join, sample_text, tag
from fisherscope.words import level


def tables_of(result: Result, rows: int = 10) -> Tables:
    """Tables of a result for the page; for types that are not known here, its ``top(rows)``."""
    for kind, make in _TABLES.items():
        if isinstance(result, kind):
            return make(result, rows)
    return Tables([table(result.top(rows), "The rows that matter most")])


def _samples(frame: pd.DataFrame, letter: str) -> list[Html]:
    """Ids of one side of the pairs, each with its text where there is one."""
    texts = frame[f"text_{letter}"] if f"text_{letter}" in frame else [None] * len(frame)
    return [
        join([tag("span", name, class_="id"), sample_text(text) if isinstance(text, str) else ""])
        for name, text in zip(frame[f"sample_{letter}"], texts, strict=True)
    ]


def _fisher(result: FisherResult, rows: int) -> Tables:
    columns = [WHERE, "mean", "ci_low", "ci_high", "largest_share", "largest_sample", "size"]
    interval = f"{level(result.config['confidence'])} interval"
    tasks = result.frame["task"].unique()
    return Tables(
        [],
        [
            table(result.top(rows, task=t), f"{t}: highest F per weight, with {interval}", columns)
            for t in tasks
        ],
    )


def _importance(result: ImportanceResult, rows: int) -> Tables:
    columns = [
        "rank", WHERE, "global_share", "layer_share", "p_top", "rank_low", "rank_high", "taylor", "obd",
    ]  # fmt: skip
    tasks = result.frame["task"].unique()
    ranks = [table(result.top(rows, task=task), f"{task}: head slices by rank", columns) for task in tasks]
    differences = []
    for (a, b), part in result.extra["differences"].groupby(["task_a", "task_b"], sort=False):
        part = part.rename(columns={"share_a": f"share in {a}", "share_b": f"share in {b}"})  # noqa: PLW2901
        shown = [WHERE, f"share in {a}", f"share in {b}", "difference"]
        differences.append(table(part.head(5), f"Where {a} and {b} differ most", shown))
    return Tables([], [*ranks, *differences])


def _masks(result: MasksResult, rows: int) -> Tables:
    columns = ["task", "kind", "sparsity", "layer", "units", "kept", "achieved"]
    return Tables([], [table(result.top(rows), "Layers that masks strip most bare", columns)])


def _overlap(result: OverlapResult, rows: int) -> Tables:
    whole = result.frame[result.frame["level"] == "all"]
    columns = [
        "task_a", "task_b", "kind", "sparsity", "units", "shared", "jaccard", "chance", "excess", "p_value",
    ]  # fmt: skip
    regions = ["task_a", "task_b", "kind", "sparsity", WHERE, "share_a", "share_b"]
    return Tables(
        [table(result.top(rows), "Kept by both tasks at the highest sparsity", regions)],
        [table(whole, "Overlap of all masks", columns)],
    )


def _interference(result: InterferenceResult, rows: int) -> Tables:
    best = result.top(rows)
    sides = {"sample i": _samples(best, "i"), "sample j": _samples(best, "j")}
    columns = ["task_a", "task_b", "score", WHERE, *sides]
    return Tables([table(best, "Pairs of samples with the highest scores", columns, sides)])


_TABLES: dict[type[Result], Callable[[Any, int], Tables]] = {
    FisherResult: _fisher,
    ImportanceResult: _importance,
    MasksResult: _masks,
    OverlapResult: _overlap,
    ConflictResult: conflict_tables,
    InterferenceResult: _interference,
}
