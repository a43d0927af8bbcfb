"""Figures of interference: where one task moves what another leans on."""

from __future__ import annotations

import pandas as pd

from fisherscope.analyses.interference import InterferenceResult
from fisherscope.report.figures.maps import Hover, head_map, heads_note
from fisherscope.report.figures.registry import Figure, register_figures


def drawn_column(result: InterferenceResult) -> str:
    """The column that tells slices apart: "max" where F is the first task's, else "mean".

    With the F of task A and all its samples, the mean of C_i / F over i is 1, and the mean score is the mean
    of ``|g_j|``: it says nothing about A.
    """
    return "max" if result.config["fisher_pool"] == "A" else "mean"


@register_figures(InterferenceResult)
def interference_figures(result: InterferenceResult) -> list[Figure]:
    """One heat map per ordered pair of tasks."""
    return [
        _map(str(a), str(b), rows, drawn_column(result))
        for (a, b), rows in result.frame.groupby(["task_a", "task_b"], sort=False)
        if rows["mean"].notna().any()
    ]


def _map(a: str, b: str, rows: pd.DataFrame, value: str) -> Figure:
    hover = [
        Hover("mean score" if value == "max" else "highest score", "mean" if value == "max" else "max"),
        Hover("median F", "fisher_median"),
        Hover("F below epsilon", "below_epsilon", ".1%"),
        Hover("damping", "ridge"),
    ]
    which = "highest" if value == "max" else "mean"
    return Figure(
        title=f"{a} on {b}: {which} interference score per head slice",
        plot=head_map(rows, value, "score", hover=hover),
        caption=f"Over all pairs of a sample of {a}, whose contributions count, and one of {b}, whose "
        f"gradient moves the weights. {heads_note(rows)}".strip(),
        wide=True,
    )
