"""Figures of Fisher information: where the Fisher information of each task sits."""

from __future__ import annotations

import pandas as pd

from fisherscope.analyses.fisher import FisherResult
from fisherscope.report.figures.maps import Hover, head_map, heads_note
from fisherscope.report.figures.parts import PlotlyDict, axis, column, label, plot
from fisherscope.report.figures.registry import Figure, register_figures
from fisherscope.report.figures.scales import category
from fisherscope.words import level


@register_figures(FisherResult)
def fisher_figures(result: FisherResult) -> list[Figure]:
    """One heat map per task, and the profile over depth of all tasks."""
    figures = []
    frame = result.frame
    heads = frame[(frame["kind"] == "head") & (frame["part"] == "weight")].rename(columns={"index": "head"})
    for task, rows in heads.groupby("task", sort=False):
        figures.append(_map(str(task), rows))
    layers = frame[frame["kind"] == "layer"]
    if len(layers):
        figures.append(_depth(layers, result.config["confidence"]))
    return figures


def _map(task: str, rows: pd.DataFrame) -> Figure:
    hover = [Hover("entries", "size", ",d")]
    if rows["ci_low"].notna().any():
        hover += [Hover("interval from", "ci_low"), Hover("to", "ci_high")]
    hover += [Hover("largest sample carries", "largest_share", ".0%"), Hover("it is", "largest_sample", "")]
    return Figure(
        title=f"{task}: Fisher information of every head slice",
        plot=head_map(rows, "mean", "F", hover=hover, log=True),
        caption=f"Mean F per weight entry of the slice; colours are logarithmic. {heads_note(rows)}".strip(),
        wide=True,
    )


def _depth(layers: pd.DataFrame, confidence: float) -> Figure:
    data: list[PlotlyDict] = []
    resampled = bool(layers["bootstrap_low"].notna().any())
    low, high = ("bootstrap_low", "bootstrap_high") if resampled else ("ci_low", "ci_high")
    for number, ((task, stack), rows) in enumerate(layers.groupby(["task", "stack"], sort=False)):
        rows = rows.sort_values("layer")  # noqa: PLW2901
        name = str(task) if stack in {"", "decoder"} else f"{task} ({stack})"
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label(name),
                "x": rows["layer"].tolist(),
                "y": column(rows["mean"]),
                "line": {"color": category(number), "width": 2},
                "marker": {"size": 7},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": column((rows[high] - rows["mean"]).clip(lower=0)),
                    "arrayminus": column((rows["mean"] - rows[low]).clip(lower=0)),
                    "thickness": 1.2,
                    "width": 3,
                },
                "hovertemplate": f"{label(name)}, layer %{{x:d}}<br>F %{{y:.3g}}<extra></extra>",
            }
        )
    kind = "bootstrap" if resampled else "t"
    return Figure(
        title="Fisher information over depth",
        plot=plot(
            data,
            340,
            xaxis=axis("layer", dtick=1 if layers["layer"].nunique() <= 16 else None),
            yaxis=axis("mean F per weight", type="log", exponentformat="power", dtick=1),
        ),
        caption=f"All instrumented parameters of a layer, with {level(confidence)} {kind} intervals.",
    )
