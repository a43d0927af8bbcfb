"""Pieces that the figures share: text, numbers, axes."""

from __future__ import annotations

import html
import math
import numbers
from collections.abc import Iterable
from typing import Any

PlotlyDict = dict[str, Any]

LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"}

BLOCKS = ("Q", "K", "V", "O")


def label(text: object) -> str:
    """Text for plotly, which reads a few HTML tags: none is left."""
    return html.escape(str(text), quote=False)


def rounded(value: Any, digits: int = 4) -> float | None:
    """A number with so many significant digits, for a small page; None for NaN and infinity."""
    number = float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None


def cell(value: Any) -> Any:
    """A value for a hover text: whole numbers whole, others rounded, texts safe for plotly."""
    if isinstance(value, str):
        return label(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return rounded(value)


def column(values: Iterable[Any]) -> list[float | None]:
    """Rounded numbers of a column."""
    return [rounded(value) for value in values]


def block_rank(name: object) -> int:
    """Place of a block in Q, K, V, O; others come after them."""
    return BLOCKS.index(str(name)) if name in BLOCKS else len(BLOCKS)


def slice_label(row: Any, head: str = "head") -> str:
    """Short name of a head slice for an axis: ``L2 O 5``; the stack is named outside the decoder."""
    stack = "" if row["stack"] in {"", "decoder"} else f"{row['stack']} "
    return label(f"{stack}L{row['layer']} {row['block']} {row[head]}")


def axis(title: str = "", **more: Any) -> PlotlyDict:
    """An axis in the page's style."""
    return {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False, **more}


def count_axis(title: str, most: int) -> PlotlyDict:
    """An axis of counts from 0 to the highest one: whole numbers, none of them twice."""
    few = {"dtick": 1} if most <= 5 else {}
    return axis(title, tickformat=",d", rangemode="tozero", **few)


def plot(data: list[PlotlyDict], height: int, **layout: Any) -> PlotlyDict:
    """A figure in the page's style; colours of text and lines are the page's, set when it is shown.

    Args:
        data: traces.
        height: in pixels.
        **layout: further keys of the layout.
    """
    base: PlotlyDict = {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
        "hovermode": "closest",
        "legend": LEGEND,
    }
    return {"data": data, "layout": base | layout}
