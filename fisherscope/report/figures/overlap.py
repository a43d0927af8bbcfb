"""Figures of overlap: overlap of masks against chance."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fisherscope.analyses.masks import WORDS
from fisherscope.analyses.overlap import OverlapResult
from fisherscope.report.figures.parts import PlotlyDict, axis, column, label, plot, rounded
from fisherscope.report.figures.registry import Figure, register_figures
from fisherscope.report.figures.scales import category, colorscale
from fisherscope.words import level

_CHANCE = "#8a8a8a"
_HOVER = (
    "Jaccard %{customdata[0]:.3f}, by chance %{customdata[1]:.3f}<br>p %{customdata[2]:.2g}<extra></extra>"
)


@register_figures(OverlapResult)
def overlap_figures(result: OverlapResult) -> list[Figure]:
    """Per kind: Jaccard index beside its chance level; for head slices, the excess layer by layer."""
    frame = result.frame
    whole = frame[frame["level"] == "all"]
    figures = [_against_chance(str(kind), rows) for kind, rows in whole.groupby("kind", sort=False)]
    heads = frame[(frame["level"] == "layer") & (frame["kind"] == "head")]
    heads = heads[heads["sparsity"] == heads["sparsity"].min()]
    if heads["excess"].notna().any():
        figures.append(_layers(heads))
    return figures


def _against_chance(kind: str, rows: pd.DataFrame) -> Figure:
    names = [
        f"{label(r['task_a'])} / {label(r['task_b'])}  {level(r['sparsity'])}"
        for r in rows.to_dict("records")
    ]
    joined_x: list[float | None] = []
    joined_y: list[str | None] = []
    for name, jaccard, chance in zip(names, column(rows["jaccard"]), column(rows["chance"]), strict=True):
        joined_x += [chance, jaccard, None]
        joined_y += [name, name, None]
    points: PlotlyDict = {
        "type": "scatter",
        "mode": "markers",
        "y": names,
        "customdata": [column(v) for v in rows[["jaccard", "chance", "p_value"]].to_numpy()],
        "hovertemplate": "%{y}<br>" + _HOVER,
    }
    line = {"color": _CHANCE, "width": 2}
    tick = {"symbol": "line-ns-open", "size": 13, "color": _CHANCE, "line": {"width": 2}}
    dot = {"size": 11, "color": category(0)}
    data: list[PlotlyDict] = [
        {"type": "scatter", "mode": "lines", "x": joined_x, "y": joined_y, "line": line}
        | {"showlegend": False, "hoverinfo": "skip"},
        points | {"name": "by chance", "x": column(rows["chance"]), "marker": tick},
        points | {"name": "Jaccard index", "x": column(rows["jaccard"]), "marker": dot},
    ]
    return Figure(
        title=f"Overlap of masks: {WORDS.get(kind, kind)}",
        plot=plot(
            data,
            26 * len(names) + 96,
            xaxis=axis("shared / either", range=[-0.02, 1.02]),
            yaxis=axis(
                categoryorder="array",
                categoryarray=names,
                autorange="reversed",
                showgrid=False,
                type="category",
            ),
        ),
        caption="Each row: two tasks and the share removed. Right of the tick: more in common than random "
        "masks of that size.",
    )


def _layers(rows: pd.DataFrame) -> Figure:
    sparsity = rows["sparsity"].min()
    pairs = rows.assign(
        pair=[f"{label(r['task_a'])} / {label(r['task_b'])}" for r in rows.to_dict("records")],
        place=[
            str(r["layer"]) if rows["stack"].nunique() == 1 else label(f"{r['stack']} {r['layer']}")
            for r in rows.to_dict("records")
        ],
    )
    names, places = pairs["pair"].unique().tolist(), pairs["place"].unique().tolist()
    cells = {(r["pair"], r["place"]): r for r in pairs.to_dict("records")}
    grid = [[cells.get((name, place), {}) for place in places] for name in names]
    reach = float(np.nanmax(np.abs(rows["excess"]))) or 1.0
    bar = {"title": {"text": "excess", "side": "top"}, "thickness": 10, "outlinewidth": 0, "ypad": 0}
    shown = ("jaccard", "chance", "p_value")
    data: list[PlotlyDict] = [
        {
            "type": "heatmap",
            "z": [[rounded(cell.get("excess", np.nan)) for cell in row] for row in grid],
            "customdata": [[column(cell.get(key, np.nan) for key in shown) for cell in row] for row in grid],
            "x": places,
            "y": names,
            "coloraxis": "coloraxis",
            "xgap": 1,
            "ygap": 1,
            "hoverongaps": False,
            "hovertemplate": "%{y}, layer %{x}<br>" + _HOVER,
        }
    ]
    return Figure(
        title=f"Head slices at {level(sparsity)} sparsity: overlap beyond chance, by layer",
        plot=plot(
            data,
            34 * len(names) + 96,
            coloraxis={"colorscale": colorscale("diverging"), "cmin": -reach, "cmax": reach, "colorbar": bar},
            meta={"scale": "diverging"},
            xaxis=axis("layer", type="category", showgrid=False),
            yaxis=axis(type="category", autorange="reversed", showgrid=False),
        ),
        caption="Jaccard index minus its chance level; blue where both tasks keep the same slices.",
    )
