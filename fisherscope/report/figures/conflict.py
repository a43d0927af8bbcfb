"""Figures of conflict: where and how far samples of two tasks oppose each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherscope.analyses.conflict import ConflictResult
from fisherscope.report.figures.maps import Hover, head_map, heads_note
from fisherscope.report.figures.parts import PlotlyDict, axis, column, plot, rounded
from fisherscope.report.figures.registry import Figure, register_figures
from fisherscope.report.figures.scales import DIVERGING

_BINS = 60
_HOVER = (
    Hover("lowest", "min", "+.3f"),
    Hover("pairs below 0", "share_negative", ".0%"),
    Hover("samples of one task", "reference", "+.3f"),
)


@register_figures(ConflictResult)
def conflict_figures(result: ConflictResult) -> list[Figure]:
    """Per pair of tasks: the spread of the cosines of all sample pairs, and their mean per slice."""
    levels = result.extra["levels"]
    spreads, maps = [], []
    for pair, rows in levels.groupby(["task_a", "task_b"], sort=False):
        a, b = map(str, pair)
        whole = rows[rows["level"] == "whole"].to_dict("records")[0]
        try:
            cosines = result.cosines(a, b).to_numpy().ravel()
        except KeyError:  # too many pairs to keep: the map below says where
            pass
        else:
            spreads.append(_spread(a, b, cosines[np.isfinite(cosines)], whole))
        slices = rows[rows["level"] == "slice"]
        if len(slices):
            maps.append(_map(a, b, slices))
    return [*spreads, *maps]


def _map(a: str, b: str, rows: pd.DataFrame) -> Figure:
    note = heads_note(rows)
    return Figure(
        title=f"{a} and {b}: mean cosine of natural gradients per head slice",
        plot=head_map(rows, "mean", "cosine", hover=_HOVER, scale="diverging", form="+.3f"),
        caption=f"Over all pairs of a sample of {a} and one of {b}. Orange: they pull the slice in opposite "
        f"directions. {note}".strip(),
        wide=True,
    )


def _spread(a: str, b: str, cosines: NDArray[np.float64], whole: dict[Any, Any]) -> Figure:
    marks = [("mean", float(whole["mean"]), "solid"), ("within one task", float(whole["reference"]), "dash")]
    marks = [mark for mark in marks if np.isfinite(mark[1])]
    reach = max(0.05, *(abs(place) for _, place, _ in marks), float(np.abs(cosines).max(initial=0)))
    counts, edges = np.histogram(cosines, bins=_BINS, range=(-reach, reach))
    middles = (edges[:-1] + edges[1:]) / 2
    below, above = DIVERGING["light"][1], DIVERGING["light"][7]
    data: list[PlotlyDict] = [
        {
            "type": "bar",
            "x": column(middles),
            "y": counts.tolist(),
            "showlegend": False,
            "marker": {"color": [below if m < 0 else above for m in middles]},
            "hovertemplate": "cosine about %{x:+.3f}<br>%{y:,d} pairs<extra></extra>",
        }
    ]
    lines = [
        {
            "type": "line", "x0": rounded(place), "x1": rounded(place), "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": "#8a8a8a", "width": 1.5, "dash": dash},
        }
        for _, place, dash in marks
    ]  # fmt: skip
    values = ", ".join(f"{text} {place:+.3f}" for text, place, _ in marks)
    note = {
        "text": values, "x": 0, "y": 1.01, "xref": "paper", "yref": "paper", "xanchor": "left",
        "yanchor": "bottom", "showarrow": False,
    }  # fmt: skip
    limits = [-reach * 1.05, reach * 1.05]
    return Figure(
        title=f"{a} and {b}: cosines of sample pairs",
        plot=plot(
            data,
            300,
            bargap=0.05,
            shapes=lines,
            annotations=[note],
            xaxis=axis("natural-gradient cosine over all attention weights", range=limits),
            yaxis=axis("pairs"),
        ),
        caption=f"{cosines.size:,} pairs of a sample of {a} and one of {b}. Solid line: their mean. Dashed: "
        "mean cosine of different samples of one task.",
    )
