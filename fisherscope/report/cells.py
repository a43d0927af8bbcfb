"""Tables of frames: how their columns read, and places as names of slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fisherscope.analyses.masks import WORDS
from fisherscope.analyses.units import layer_label, role_of, slice_name
from fisherscope.report.figures.parts import BLOCKS
from fisherscope.report.markup import Html, grid
from fisherscope.report.numbers import p_value, percent, short, signed
from fisherscope.words import level

_PLACE = ("stack", "layer", "block", "head", "index")
WHERE = "where"


@dataclass(frozen=True)
class _Column:
    title: str
    show: Callable[[Any], object] = short
    numeric: bool = True


def _word(value: Any) -> str:
    return str(value)


def _layer(value: Any) -> str:
    return str(value) if value >= 0 else "outside the layers"


_COLUMNS = {
    WHERE: _Column("slice", _word, numeric=False),
    "layer": _Column("layer", _layer),
    "mean": _Column("mean"),
    "ci_low": _Column("from"),
    "ci_high": _Column("to"),
    "largest_share": _Column("largest sample", percent),
    "largest_sample": _Column("which", _word, numeric=False),
    "global_share": _Column("share of F", percent),
    "layer_share": _Column("share in layer", percent),
    "p_top": _Column("P(top)"),
    "sparsity": _Column("sparsity", level),
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
    "mean_cosine": _Column("mean cosine", signed),
    "own_cosine": _Column("within its task", signed),
    "share": _Column("share", percent),
    "p": _Column("p", p_value),
    "p_value": _Column("p", p_value),
    "q": _Column("q", p_value),
    "slice_q": _Column("q there", p_value),
    "samples_a": _Column("samples of first"),
    "samples_b": _Column("samples of second"),
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
    rest.insert(min(first, len(rest.columns)), WHERE, where)
    return rest


def _other_place(row: dict[Any, Any], number: str) -> str:
    if row["layer"] < 0:
        return str(row.get("parameter") or "outside the layers")
    parts = [layer_label(row), str(row["block"])]
    return " ".join([*filter(None, parts), *([str(row[number])] if row[number] >= 0 else [])])
