"""Figures of masks: where masks leave something."""

from __future__ import annotations

import pandas as pd

from fisherscope.analyses.masks import WORDS, MasksResult
from fisherscope.report.figures.parts import PlotlyDict, axis, column, label, plot
from fisherscope.report.figures.registry import Figure, register_figures
from fisherscope.report.figures.scales import category
from fisherscope.words import level


@register_figures(MasksResult)
def masks_figures(result: MasksResult) -> list[Figure]:
    """For each kind of unit: the share that stays in each layer at the highest sparsity."""
    layers = result.frame[result.frame["level"] == "layer"]
    return [_bars(str(kind), rows) for kind, rows in layers.groupby("kind", sort=False)]


def _bars(kind: str, rows: pd.DataFrame) -> Figure:
    sparsity = rows["sparsity"].max()
    data: list[PlotlyDict] = []
    for number, (task, part) in enumerate(rows[rows["sparsity"] == sparsity].groupby("task", sort=False)):
        part = part[part["layer"] >= 0].sort_values(["stack", "layer"])  # noqa: PLW2901
        single = part["stack"].nunique() == 1
        data.append(
            {
                "type": "bar",
                "name": label(task),
                "x": [
                    str(row["layer"]) if single else label(f"{row['stack']} {row['layer']}")
                    for row in part.to_dict("records")
                ],
                "y": column(part["kept"] / part["units"]),
                "customdata": part[["kept", "units"]].to_numpy().tolist(),
                "marker": {"color": category(number)},
                "hovertemplate": f"{label(task)}, layer %{{x}}<br>%{{customdata[0]:,d}} of "
                "%{customdata[1]:,d} stay (%{y:.1%})<extra></extra>",
            }
        )
    return Figure(
        title=f"What stays of the {WORDS.get(kind, kind)} at {level(sparsity)} sparsity",
        plot=plot(
            data,
            300,
            barmode="group",
            bargap=0.3,
            xaxis=axis("layer", type="category", showgrid=False),
            yaxis=axis("share kept", tickformat="~%", rangemode="tozero"),
        ),
        caption="Per layer; the highest F stays.",
    )
