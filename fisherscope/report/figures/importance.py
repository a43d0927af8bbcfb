"""Figures of importance: the ranking of head slices, and how the tasks' rankings compare."""

from __future__ import annotations

import math

import pandas as pd

from fisherscope.analyses.importance import ImportanceResult
from fisherscope.report.figures.parts import (
    LEGEND,
    PlotlyDict,
    axis,
    block_rank,
    cell,
    column,
    label,
    plot,
    slice_label,
)
from fisherscope.report.figures.registry import Figure, register_figures
from fisherscope.report.figures.scales import BLOCK_COLORS, category
from fisherscope.report.figures.ticks import share_ticks

_MOST_PAIRS = 6
_HOVERED = ("taylor", "obd", "rank", "rank_low", "rank_high", "p_top")


@register_figures(ImportanceResult)
def importance_figures(result: ImportanceResult) -> list[Figure]:
    """Bars of the top head slices of each task, and a scatter of the shares for each pair of tasks."""
    heads = result.frame[result.frame["kind"] == "head"]
    by_task = {str(task): rows for task, rows in heads.groupby("task", sort=False)}
    top_k = min(max(int(result.config["top_k"]), 5), 30)
    figures = [_bars(task, rows, top_k) for task, rows in by_task.items()]
    pairs = result.extra["tasks"]
    for row in pairs[pairs["kind"] == "head"].head(_MOST_PAIRS).to_dict("records"):
        a, b = row["task_a"], row["task_b"]
        figures.append(_scatter(a, b, by_task[a], by_task[b], row["spearman"]))
    return figures


def _by_block(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows of each block, in the order Q, K, V, O."""
    return [(name, rows[rows["block"] == name]) for name in sorted(rows["block"].unique(), key=block_rank)]


def _bars(task: str, rows: pd.DataFrame, top_k: int) -> Figure:
    best = rows.sort_values("rank").head(top_k)
    sure = bool(best["p_top"].notna().any())
    lines = ["%{y}", "share of F %{x:.2%}", "Taylor %{customdata[0]:.3g}, OBD %{customdata[1]:.3g}"]
    if sure:
        lines.append("rank %{customdata[2]:,d} (95 % of resamples: %{customdata[3]} to %{customdata[4]})")
        lines.append("P(in the top list) %{customdata[5]:.2f}")
    data: list[PlotlyDict] = []
    names = [slice_label(row, "index") for row in best.to_dict("records")]
    for block, part in _by_block(best.assign(name=names)):
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label(block),
                "y": part["name"].tolist(),
                "x": column(part["global_share"]),
                "customdata": [[cell(row[name]) for name in _HOVERED] for row in part.to_dict("records")],
                "marker": {"color": BLOCK_COLORS.get(block, category(5))},
                "hovertemplate": "<br>".join(lines) + "<extra></extra>",
            }
        )
    return Figure(
        title=f"{task}: head slices that matter most",
        plot=plot(
            data,
            24 * len(best) + 92,
            barmode="stack",
            bargap=0.25,
            showlegend=True,
            legend={**LEGEND, "traceorder": "normal"},
            xaxis=axis("share of the F of all head slices", tickformat="~%", rangemode="tozero"),
            yaxis=axis(categoryorder="array", categoryarray=names, autorange="reversed", showgrid=False),
        ),
        caption="Layer, block, head; K and V are numbered by kv head. Mean F per weight entry.",
    )


def _scatter(a: str, b: str, first: pd.DataFrame, second: pd.DataFrame, spearman: float) -> Figure:
    place = ["stack", "layer", "block", "index"]
    both = first.merge(second, on=place, suffixes=("_a", "_b"))
    both = both[(both["global_share_a"] > 0) & (both["global_share_b"] > 0)]
    hover = f"%{{text}}<br>{label(a)} %{{x:.2%}}<br>{label(b)} %{{y:.2%}}<extra></extra>"
    data: list[PlotlyDict] = []
    for block, rows in _by_block(both):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(block),
                "x": column(rows["global_share_a"]),
                "y": column(rows["global_share_b"]),
                "text": [slice_label(row, "index") for row in rows.to_dict("records")],
                "marker": {"size": 8, "opacity": 0.8, "color": BLOCK_COLORS.get(block, category(5))},
                "hovertemplate": hover,
            }
        )
    ticks: PlotlyDict = {}
    if len(both):
        shares = both[["global_share_a", "global_share_b"]].to_numpy()
        ends = column([shares.min(), shares.max()])
        ticks = share_ticks(float(shares.min()), float(shares.max()))
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": ends,
                "y": ends,
                "hoverinfo": "skip",
                "showlegend": False,
                "line": {"color": "#8a8a8a", "width": 1, "dash": "dot"},
            }
        )
    rank = "" if math.isnan(spearman) else f"Spearman correlation of the rankings: {spearman:.2f}."
    x, y = (axis(f"share in {label(task)}", type="log", **ticks) for task in (a, b))
    return Figure(
        title=f"{a} against {b}: share of F per head slice",
        plot=plot(data, 380, xaxis=x, yaxis=y),
        caption=f"Slices on the dotted line matter equally to both. {rank}".strip(),
    )
