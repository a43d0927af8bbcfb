"""Which tables a section shows, and how their columns read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fisherscope.analyses import Result
from fisherscope.analyses.conflict import ConflictResult
from fisherscope.analyses.fisher import FisherResult
from fisherscope.analyses.importance import ImportanceResult
from fisherscope.analyses.interference import InterferenceResult
from fisherscope.analyses.masks import WORDS, MasksResult
from fisherscope.analyses.overlap import OverlapResult
from fisherscope.analyses.units import role_of, slice_name
from fisherscope.report.figures.parts import BLOCKS
from fisherscope.report.markup import Html, grid, join, sample_text, tag
from fisherscope.report.numbers import p_value, percent, short, signed

_PLACE = ("stack", "layer", "block", "head", "index")
_WHERE = "where"


@dataclass(frozen=True)
class _Column:
    title: str
    show: Callable[[Any], object] = short
    numeric: bool = True


def _word(value: Any) -> str:
    return str(value)


def _level(value: Any) -> str:
    return f"{float(value):.0%}"


_COLUMNS = {
    _WHERE: _Column("slice", _word, numeric=False),
    "mean": _Column("mean"),
    "ci_low": _Column("from"),
    "ci_high": _Column("to"),
    "largest_share": _Column("largest sample", percent),
    "largest_sample": _Column("which", _word, numeric=False),
    "global_share": _Column("share of F", percent),
    "layer_share": _Column("share in layer", percent),
    "p_top": _Column("P(top)"),
    "sparsity": _Column("sparsity", _level),
    "achieved": _Column("removed", percent),
    "share_a": _Column("share in first", percent),
    "share_b": _Column("share in second", percent),
    "task_a": _Column("first task", _word, numeric=False),
    "task_b": _Column("second task", _word, numeric=False),
    "cosine": _Column("cosine", signed),
    "excess": _Column("excess", signed),
    "effect_size": _Column("d"),
    "slice_cosine": _Column("cosine there", signed),
    "jaccard": _Column("Jaccard"),
    "chance": _Column("by chance"),
    "p_value": _Column("p", p_value),
    "taylor": _Column("Taylor"),
    "obd": _Column("OBD"),
    "kind": _Column("kind", lambda kind: WORDS.get(kind, kind), numeric=False),
}


@dataclass(frozen=True)
class Tables:
    """Tables of one section.

    Attributes:
        shown: what everybody sees.
        folded: what opens on demand.
    """

    shown: list[Html]
    folded: list[Html] = field(default_factory=list)


def tables_of(result: Result, rows: int = 10) -> Tables:
    """Tables of a result for the page; for types that are not known here, its ``top(rows)``."""
    for kind, make in _TABLES.items():
        if isinstance(result, kind):
            return make(result, rows)
    return Tables([table(result.top(rows), f"The {rows} rows that matter most")])


def table(
    frame: pd.DataFrame,
    caption: str,
    columns: list[str] | None = None,
    cells: Mapping[str, Sequence[Html]] | None = None,
) -> Html:
    """A table of a frame; columns that tell a head slice's place become one.

    Args:
        frame: what to show.
        caption: above it.
        columns: which columns, in this order; "where" is the place. Absent ones are left out; all when None.
        cells: further columns that are HTML already, by title: a frame would turn them into plain text.
    """
    ready = cells or {}
    shown = _placed(frame)
    names = [c for c in (columns or list(shown.columns)) if c in shown.columns or c in ready]
    titles, numeric, texts = [], [], []
    for name in names:
        if name in ready:
            titles.append(name)
            numeric.append(False)
            texts.append(list[object](ready[name]))
        else:
            column = _COLUMNS.get(name) or _guess(name, shown[name])
            titles.append(column.title)
            numeric.append(column.numeric)
            texts.append([column.show(value) for value in shown[name].tolist()])
    return grid(titles, zip(*texts, strict=True), numeric, caption if len(shown) else f"{caption}: none")


def _guess(name: str, values: pd.Series[Any]) -> _Column:
    if pd.api.types.is_numeric_dtype(values):
        return _Column(name.replace("_", " "))
    return _Column(name.replace("_", " "), _word, numeric=False)


def _placed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the columns of a place put together into ``where``."""
    number = "head" if "head" in frame else "index"
    if not {"stack", "layer", "block", number} <= set(frame.columns):
        return frame
    where = [
        slice_name(row, head=number) if role_of(str(row["block"])) in BLOCKS else _other_place(row, number)
        for row in frame.to_dict("records")
    ]
    first = min(list(frame.columns).index(c) for c in _PLACE if c in frame)
    rest = frame.drop(columns=[c for c in _PLACE if c in frame])
    rest.insert(min(first, len(rest.columns)), _WHERE, where)
    return rest


def _other_place(row: dict[Any, Any], number: str) -> str:
    parts = [f"L{row['layer']}" if row["layer"] >= 0 else "model", str(row["block"])]
    return " ".join([*filter(None, parts), *([str(row[number])] if row[number] >= 0 else [])])


def _samples(frame: pd.DataFrame, letter: str) -> list[Html]:
    """Ids of one side of the pairs, each with its text where there is one."""
    texts = frame[f"text_{letter}"] if f"text_{letter}" in frame else [None] * len(frame)
    return [
        join([tag("span", name, class_="id"), sample_text(text) if isinstance(text, str) else ""])
        for name, text in zip(frame[f"sample_{letter}"], texts, strict=True)
    ]


def _fisher(result: FisherResult, rows: int) -> Tables:
    columns = [_WHERE, "mean", "ci_low", "ci_high", "largest_share", "largest_sample", "size"]
    level = f"{result.config['confidence']:.0%} interval"
    tasks = result.frame["task"].unique()
    return Tables(
        [],
        [table(result.top(rows, task=t), f"{t}: highest F per weight, with {level}", columns) for t in tasks],
    )


def _importance(result: ImportanceResult, rows: int) -> Tables:
    columns = [
        "rank", _WHERE, "global_share", "layer_share", "p_top", "rank_low", "rank_high", "taylor", "obd",
    ]  # fmt: skip
    tasks = result.frame["task"].unique()
    ranks = [table(result.top(rows, task=task), f"{task}: head slices by rank", columns) for task in tasks]
    differences = []
    for (a, b), part in result.extra["differences"].groupby(["task_a", "task_b"], sort=False):
        part = part.rename(columns={"share_a": f"share in {a}", "share_b": f"share in {b}"})  # noqa: PLW2901
        shown = [_WHERE, f"share in {a}", f"share in {b}", "difference"]
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
    regions = ["task_a", "task_b", "kind", "sparsity", _WHERE, "share_a", "share_b"]
    return Tables(
        [table(result.top(rows), "Kept by both tasks at the highest sparsity", regions)],
        [table(whole, "Overlap of all masks", columns)],
    )


def _conflict(result: ConflictResult, rows: int) -> Tables:
    found = []
    for (a, b), part in result.frame.groupby(["task_a", "task_b"], sort=False):
        best = part.head(rows)
        sides = {f"sample of {a}": _samples(best, "a"), f"sample of {b}": _samples(best, "b")}
        columns = ["cosine", "excess", "effect_size", *sides, _WHERE, "slice_cosine"]
        found.append(table(best, f"{a} and {b}: most opposed pairs of samples", columns, sides))
    return Tables(found)


def _interference(result: InterferenceResult, rows: int) -> Tables:
    best = result.top(rows)
    sides = {"sample i": _samples(best, "i"), "sample j": _samples(best, "j")}
    columns = ["task_a", "task_b", "score", _WHERE, *sides]
    return Tables([table(best, "Pairs of samples with the highest scores", columns, sides)])


_TABLES: dict[type[Result], Callable[[Any, int], Tables]] = {
    FisherResult: _fisher,
    ImportanceResult: _importance,
    MasksResult: _masks,
    OverlapResult: _overlap,
    ConflictResult: _conflict,
    InterferenceResult: _interference,
}
