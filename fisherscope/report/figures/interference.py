"""Figures of interference: where one task moves what another leans on."""

from __future__ import annotations

import pandas as pd

from fisherscope.analyses.interference import InterferenceResult
from fisherscope.report.figures.maps import Hover, head_map, heads_note
from fisherscope.report.figures.registry import Figure, register_figures

SIGNIFICANT = 0.05


@register_figures(InterferenceResult)
def interference_figures(result: InterferenceResult) -> list[Figure]:
    """One heat map per ordered pair of tasks."""
    return [
        _map(str(a), str(b), rows, result)
        for (a, b), rows in result.frame.groupby(["task_a", "task_b"], sort=False)
        if rows["mean"].notna().any()
    ]


def _map(a: str, b: str, rows: pd.DataFrame, result: InterferenceResult) -> Figure:
    value = result.telling
    hover = [
        Hover("mean score", "mean"),
        Hover("highest score", "max"),
        Hover("overlap beyond that within tasks", "effect", "+.2g"),
        Hover("q of that", "q", ".2g"),
        Hover("median F", "fisher_median"),
        Hover("F below epsilon", "below_epsilon", ".1%"),
        Hover("damping", "ridge"),
    ]
    marked = rows.assign(marked=rows["q"] < SIGNIFICANT)
    dots = f"Dots: overlap unlike that within tasks, q < {SIGNIFICANT}. " if marked["marked"].any() else ""
    which = "mean score" if value == "mean" else f"score that 5% of {a}'s samples exceed"
    return Figure(
        title=f"{a} on {b}: {which}, per head slice",
        plot=head_map(
            marked,
            value,
            "score",
            hover=hover,
            scale="diverging" if result.signed else "sequential",
            marked="marked",
        ),
        caption=f"Over all pairs of a sample of {a}, whose contributions count, and one of {b}, whose "
        f"gradient moves the weights. {dots}{heads_note(rows)}".strip(),
        wide=True,
    )
