"""Figures of conflict: which samples of two tasks oppose each other, where, and how far."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherscope.analyses.conflict import ConflictResult
from fisherscope.report.figures.calibration import calibration
from fisherscope.report.figures.maps import Hover, head_map, heads_note
from fisherscope.report.figures.network import network
from fisherscope.report.figures.parts import PlotlyDict, axis, column, count_axis, plot, rounded
from fisherscope.report.figures.registry import Figure, register_figures
from fisherscope.report.figures.scales import DIVERGING
from fisherscope.words import counted

_BINS = 60
_HOVER = (
    Hover("excess over samples of one task", "excess", "+.3f"),
    Hover("t", "t", ".2f"),
    Hover("p", "p", ".2g"),
    Hover("q", "q", ".2g"),
    Hover("margin", "margin", ".3f"),
    Hover("lowest pair", "min", "+.3f"),
    Hover("pairs below 0", "share_negative", ".0%"),
)


@register_figures(ConflictResult)
def conflict_figures(result: ConflictResult) -> list[Figure]:
    """Per pair of tasks: which samples conflict, where, whether the tests can be trusted, and the spread."""
    networks, maps, trials, spreads = [], [], [], []
    for pair, rows in result.extra["levels"].groupby(["task_a", "task_b"], sort=False):
        a, b = map(str, pair)
        found = of_pair(result.frame, a, b)
        if len(found := found[found["found"].astype(bool)]):
            networks.append(network(found, of_pair(result.extra["clusters"], a, b)))
        slices = rows[rows["level"] == "slice"]
        if len(slices):
            maps.append(_map(a, b, slices, float(result.config["level"])))
        trials.append(
            calibration(*(of_pair(result.extra[key], a, b) for key in ("calibration", "calibration_p")))
        )
        spreads.append(_spread_of(result, a, b, rows))
    return [*networks, *maps, *filter(None, trials), *filter(None, spreads)]


def of_pair(frame: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """Rows of a pair of tasks."""
    return frame[(frame["task_a"] == a) & (frame["task_b"] == b)]


def _map(a: str, b: str, rows: pd.DataFrame, level: float) -> Figure:
    marked = rows.assign(marked=rows["q"] < level)
    dots = "Dots: below what groups of samples of one task do to each other"
    dots = f"{dots} (q < {level:g})." if marked["marked"].any() else ""
    words = [
        f"Over all pairs of a sample of {a} and one of {b}. Orange: they pull the slice apart.",
        dots,
        heads_note(rows),
    ]
    return Figure(
        title=f"{a} and {b}: mean cosine of natural gradients per head slice",
        plot=head_map(
            marked, "mean", "cosine", hover=_HOVER, scale="diverging", form="+.3f", marked="marked"
        ),
        caption=" ".join(filter(None, words)),
        wide=True,
    )


def _spread_of(result: ConflictResult, a: str, b: str, rows: pd.DataFrame) -> Figure | None:
    whole = rows[rows["level"] == "whole"].to_dict("records")[0]
    try:
        cosines = result.cosines(a, b).to_numpy().ravel()
    except KeyError:  # too many pairs to keep: the maps say where
        return None
    return _spread(a, b, cosines[np.isfinite(cosines)], whole)


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
            "customdata": [counted(int(count), "pair") for count in counts],
            "hovertemplate": "cosine about %{x:+.3f}<br>%{customdata}<extra></extra>",
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
            yaxis=count_axis("pairs", int(counts.max(initial=0))),
        ),
        caption=f"{counted(cosines.size, 'pair')} of a sample of {a} and one of {b}. Solid line: their mean. "
        "Dashed: mean cosine of different samples of one task.",
    )
