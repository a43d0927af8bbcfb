"""Layer x head heat maps, one panel per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherscope.analyses.units import role_of
from fisherscope.report.figures.parts import PlotlyDict, axis, block_rank, cell, label, plot, rounded
from fisherscope.report.figures.scales import colorscale
from fisherscope.report.figures.ticks import log_ticks
from fisherscope.words import counted

Array = NDArray[np.float64]
Scale = Literal["sequential", "diverging"]

_GAP = 0.025
_NARROWEST = 0.1


@dataclass(frozen=True)
class Hover:
    """A line of the hover text.

    Attributes:
        text: what the number is.
        column: where it stands; text and numbers both work.
        form: d3 format of numbers, "" for text.
    """

    text: str
    column: str
    form: str = ".3g"


@dataclass(frozen=True)
class _Panel:
    stack: str
    block: str
    layers: list[int]
    rows: pd.DataFrame
    heads: int
    shared: bool

    @property
    def what(self) -> str:
        return "kv head" if self.shared else "head"

    @property
    def title(self) -> str:
        name = self.block if self.stack in {"", "decoder"} else f"{self.stack} {self.block}"
        return f"<b>{label(name)}</b>"


def head_map(
    rows: pd.DataFrame,
    value: str,
    title: str,
    *,
    hover: Sequence[Hover] = (),
    scale: Scale = "sequential",
    log: bool = False,
    form: str = ".3g",
    marked: str | None = None,
) -> PlotlyDict:
    """Panels for Q, K, V, O (per stack) over layers and heads, with one colour scale.

    Args:
        rows: one row per slice: stack, layer, block, head, and the columns below.
        value: column that is drawn; NaN stays blank.
        title: of the colour bar and of the value in the hover text.
        hover: further lines.
        scale: "diverging" is centred at 0.
        log: colours stand for the logarithm; values of 0 stay blank.
        form: d3 format of the value.
        marked: column of truths; cells where it holds carry a dot.
    """
    panels = _panels(rows)
    drawn = rows[value].to_numpy(np.float64)
    log = log and bool((drawn > 0).any())
    data = [
        _trace(panel, number, value, (title, form), hover, log=log) for number, panel in enumerate(panels, 1)
    ]
    row_height = _row_height(panels)
    if marked:
        for trace, panel in zip(data, panels, strict=True):
            trace.update(_dots(panel, marked, max(6, min(13, row_height // 2))))
    height = max(len(panel.layers) for panel in panels) * row_height
    layout: PlotlyDict = {
        "coloraxis": _coloraxis(drawn, title, scale, log=log),
        "meta": {"scale": scale, "panels": len(panels), "plot": height},
        "annotations": [],
    }
    for number, (panel, domain) in enumerate(zip(panels, _domains(panels), strict=True), 1):
        ending = "" if number == 1 else str(number)
        layout[f"xaxis{ending}"] = axis(
            panel.what, type="category", domain=domain, anchor=f"y{ending}", showgrid=False
        )
        layout[f"yaxis{ending}"] = axis(
            "layer" if number == 1 else "",
            type="category",
            anchor=f"x{ending}",
            autorange="reversed",
            showgrid=False,
            showticklabels=number == 1 or panel.layers != panels[0].layers,
        )
        layout["annotations"].append(
            {
                "text": panel.title, "xref": f"x{ending} domain", "yref": f"y{ending} domain", "x": 0, "y": 1,
                "xanchor": "left", "yanchor": "bottom", "showarrow": False,
            }
        )  # fmt: skip
    return plot(data, height + 84, margin={"l": 8, "r": 72, "t": 28, "b": 8}, **layout)


def heads_note(rows: pd.DataFrame) -> str:
    """One sentence on the heads of K and V where query heads share them, else nothing."""
    heads = rows.groupby("block")["head"].nunique()
    queries, keys = int(heads.get("Q", 0)), int(heads.get("K", 0))
    if not keys or keys >= queries:
        return ""
    return (
        f"K and V have {counted(keys, 'kv head')}, each shared by {counted(queries // keys, 'query head')}."
    )


def _panels(rows: pd.DataFrame) -> list[_Panel]:
    panels = []
    for stack, in_stack in rows.groupby("stack", sort=False):
        blocks = sorted(in_stack["block"].unique(), key=block_rank)
        queries = in_stack.loc[in_stack["block"].map(role_of) == "Q", "head"].nunique()
        layers = sorted(in_stack["layer"].unique().tolist())
        for block in blocks:
            part = in_stack[in_stack["block"] == block]
            heads = int(part["head"].max()) + 1
            shared = role_of(block) in {"K", "V"} and heads < queries
            panels.append(_Panel(str(stack), block, layers, part, heads, shared))
    return panels


def _row_height(panels: list[_Panel]) -> int:
    layers = max(len(panel.layers) for panel in panels)
    return max(9, min(32, 420 // layers))


def _domains(panels: list[_Panel]) -> list[list[float]]:
    """Panels side by side, cells of one width where that leaves the narrow ones wide enough."""
    widths = np.array([panel.heads for panel in panels], np.float64)
    widths = np.maximum(widths / widths.sum(), _NARROWEST)
    widths *= (1 - _GAP * (len(panels) - 1)) / widths.sum()
    starts = np.concatenate([[0], np.cumsum(widths[:-1] + _GAP)])
    return [[round(float(a), 4), round(float(a + w), 4)] for a, w in zip(starts, widths, strict=True)]


def _trace(
    panel: _Panel, number: int, value: str, shown: tuple[str, str], hover: Sequence[Hover], *, log: bool
) -> PlotlyDict:
    shape = len(panel.layers), panel.heads
    place = {layer: i for i, layer in enumerate(panel.layers)}
    z: list[list[float | None]] = [[None] * shape[1] for _ in range(shape[0])]
    custom: list[list[Any]] = [[None] * shape[1] for _ in range(shape[0])]
    for row in panel.rows.to_dict("records"):
        i, j, number_ = place[row["layer"]], int(row["head"]), float(row[value])
        visible = number_ > 0 or not log
        z[i][j] = rounded(np.log10(number_) if log and visible else number_) if visible else None
        custom[i][j] = [rounded(number_), *(cell(row[line.column]) for line in hover)]
    lines = [
        f"layer %{{y}}, {label(panel.block)} {panel.what} %{{x}}",
        f"{label(shown[0])} %{{customdata[0]:{shown[1]}}}",
        *(
            f"{line.text} %{{customdata[{k}]{':' + line.form if line.form else ''}}}"
            for k, line in enumerate(hover, 1)
        ),
    ]
    ending = "" if number == 1 else str(number)
    return {
        "type": "heatmap",
        "z": z,
        "x": [str(head) for head in range(shape[1])],
        "y": [str(layer) for layer in panel.layers],
        "customdata": custom,
        "coloraxis": "coloraxis",
        "xaxis": f"x{ending}",
        "yaxis": f"y{ending}",
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": "<br>".join(lines) + "<extra></extra>",
    }


def _dots(panel: _Panel, marked: str, size: int) -> PlotlyDict:
    """Text of a heat map: plotly gives it the colour that contrasts with its cell."""
    place = {layer: i for i, layer in enumerate(panel.layers)}
    text = [[""] * panel.heads for _ in panel.layers]
    for layer, head, mark in zip(panel.rows["layer"], panel.rows["head"], panel.rows[marked], strict=True):
        if mark:
            text[place[layer]][int(head)] = "\N{BLACK CIRCLE}"
    return {"text": text, "texttemplate": "%{text}", "textfont": {"size": size}}


def _coloraxis(values: Array, title: str, scale: Scale, *, log: bool) -> PlotlyDict:
    known = values[np.isfinite(values) & ((values > 0) | (not log))]
    bar: PlotlyDict = {
        "title": {"text": label(title), "side": "top"}, "thickness": 10, "outlinewidth": 0, "ticks": "",
        "len": 1, "y": 0.5, "xpad": 6, "ypad": 0, "tickformat": "~g",
    }  # fmt: skip
    limits: PlotlyDict = {"cmin": 0.0, "cmax": 1.0}
    if scale == "diverging":
        reach = float(np.abs(known).max()) if known.size else 1.0
        limits = {"cmin": -(reach or 1.0), "cmax": reach or 1.0}
    elif log:
        low, high = float(known.min()), float(known.max())
        limits = {"cmin": float(np.log10(low)), "cmax": float(np.log10(high)) + (1e-3 if high == low else 0)}
        bar["tickvals"], bar["ticktext"] = log_ticks(low, high)
    elif known.size and known.max() > 0:
        limits = {"cmin": 0.0, "cmax": float(known.max())}
    return {"colorscale": colorscale(scale), "colorbar": bar, **limits}
