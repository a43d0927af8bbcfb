"""Random halves of single tasks, where nothing is to be found: what the tests made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherscope.report.figures.parts import PlotlyDict, axis, column, plot, rounded
from fisherscope.report.figures.registry import Figure
from fisherscope.report.figures.scales import CATEGORIES
from fisherscope.words import counted

_GAP = 0.08


def calibration(verdicts: pd.DataFrame, bins: pd.DataFrame) -> Figure | None:
    """The p-values of A/A splits of a pair of tasks, and what follows; None where no split could be made.

    Args:
        verdicts: rows of ``extra["calibration"]`` of the two tasks, one per test.
        bins: rows of ``extra["calibration_p"]`` of the two tasks.
    """
    counted = set(bins.loc[bins["count"] > 0, "test"])
    tried = [row for row in verdicts.to_dict("records") if row["splits"] and row["test"] in counted]
    if not tried:
        return None
    a, b = (str(verdicts[f"task_{side}"].iloc[0]) for side in "ab")
    data: list[PlotlyDict] = []
    layout: PlotlyDict = {"annotations": [], "shapes": []}
    width = (1 - _GAP * (len(tried) - 1)) / len(tried)
    for number, row in enumerate(tried):
        ending = "" if number == 0 else str(number + 1)
        mine = bins[bins["test"] == row["test"]]
        data.append(_bars(mine, ending, calibrated=bool(row["calibrated"])))
        start = number * (width + _GAP)
        layout[f"xaxis{ending}"] = axis(
            "p", range=[0, 1], domain=[round(start, 4), round(start + width, 4)], anchor=f"y{ending}",
            showgrid=False, tickvals=[0, 0.5, 1], fixedrange=True,
        )  # fmt: skip
        layout[f"yaxis{ending}"] = axis(
            "p-values, as a multiple of even" if number == 0 else "",
            anchor=f"x{ending}", range=[0, _reach(mine)], fixedrange=True, nticks=4,
        )  # fmt: skip
        layout["annotations"].append({
            "text": f"<b>{row['test']}</b>", "xref": f"x{ending} domain", "yref": f"y{ending} domain", "x": 0,
            "y": 1.02, "xanchor": "left", "yanchor": "bottom", "showarrow": False,
        })  # fmt: skip
        layout["shapes"].append({
            "type": "line", "xref": f"x{ending} domain", "yref": f"y{ending}", "x0": 0, "x1": 1,
            "y0": 1, "y1": 1, "line": {"color": "#8a8a8a", "width": 1.5, "dash": "dash"},
        })  # fmt: skip
    return Figure(
        title=f"{a} and {b}: are the tests calibrated here?",
        plot=plot(data, 230, showlegend=False, bargap=0, **layout),
        caption="Random halves of one task (A/A splits) were tested against each other: nothing is to be "
        f"found there. {outcome(tried)} Dashed: even p-values, as exact tests have; bars below it at the "
        "left mean a cautious test. Bars that are too high end at the top.",
    )


def outcome(verdicts: list[dict[Any, Any]]) -> str:
    """What the splits say of the tests: rows of ``extra["calibration"]``, in sentences."""
    told = []
    if good := [row for row in verdicts if row["calibrated"]]:
        counts = ", ".join(f"{row['test']} {row['rejecting']} of {row['splits']}" for row in good)
        upper = max(row["upper"] for row in good)
        told.append(
            f"Splits that called anything: {counts}; nothing speaks against these tests here (with 95 % "
            f"confidence they call something in less than {upper:.0%} of such splits)."
        )
    told += [
        f"The test of {row['test']} called something in {row['rejecting']} of {row['splits']}, which would "
        f"be luck with a probability of {row['chance']:.2g}: its q-values are withheld."
        for row in verdicts
        if row["calibrated"] is False
    ]
    return " ".join(told)


def _reach(bins: pd.DataFrame) -> float:
    """Height that shows what counts: the small p-values. Those near 1 pile up under cautious tests."""
    return max(2.5, 1.1 * float(_multiple(bins)[bins["low"].to_numpy() < 0.5].max(initial=0)))


def _multiple(bins: pd.DataFrame) -> NDArray[np.float64]:
    """Counts as multiples of what even p-values would give."""
    count, width = bins["count"].to_numpy(np.float64), (bins["high"] - bins["low"]).to_numpy(np.float64)
    return np.asarray(count / count.sum() / width)


def _bars(bins: pd.DataFrame, ending: str, *, calibrated: bool) -> PlotlyDict:
    low, high, count = (bins[c].to_numpy(np.float64) for c in ("low", "high", "count"))
    width = high - low
    return {
        "type": "bar",
        "x": column((low + high) / 2),
        "y": column(_multiple(bins)),
        "width": column(width),
        "customdata": [
            [rounded(one), rounded(two), counted(int(n), "p-value")]
            for one, two, n in zip(low, high, count, strict=True)
        ],
        "marker": {"color": CATEGORIES[0 if calibrated else 1], "line": {"width": 0}},
        "xaxis": f"x{ending}",
        "yaxis": f"y{ending}",
        "hovertemplate": "p from %{customdata[0]} to %{customdata[1]}<br>%{customdata[2]}, "
        "%{y:.2f} times the even share<extra></extra>",
    }
