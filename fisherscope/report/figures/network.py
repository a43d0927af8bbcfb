"""The bipartite graph of found pairs: samples of one task on either side, a line per pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fisherscope.report.figures.parts import PlotlyDict, axis, column, label, plot, rounded
from fisherscope.report.figures.registry import Figure
from fisherscope.report.figures.scales import CATEGORIES
from fisherscope.words import counted

_MOST_NODES = 150
_MOST_LINES = 1200
_TALLEST = 640
_NAME = 28
_TEXT = 120
_STEPS = 4
# The last colour is grey: pairs between clusters, and clusters after the first seven.
_GREY = len(CATEGORIES) - 1


@dataclass(frozen=True)
class _Node:
    side: str
    name: str
    cluster: int
    pairs: int
    text: str
    y: float


def network(pairs: pd.DataFrame, clusters: pd.DataFrame) -> Figure:
    """The found pairs of two tasks.

    Args:
        pairs: their found pairs, at least one.
        clusters: their clusters.
    """
    a, b = (str(pairs[f"task_{side}"].iloc[0]) for side in "ab")
    shown = _strongest(pairs)
    nodes = _nodes(shown, clusters)
    height = max((node.y for node in nodes.values()), default=0.0) + 1
    step = min(22.0, _TALLEST / height)
    data = [*_lines(shown, nodes), _middles(shown, nodes)]
    data += [_side(nodes, "a", step), _side(nodes, "b", step)]
    cut = ""
    if len(shown) < len(pairs):
        cut = f" Of {len(pairs):,} found pairs the {len(shown):,} strongest are drawn; the table has all."
    names = [_clip(a), _clip(b)]
    if names[0] == names[1]:  # they differ in what was cut off
        names = [a, b]
    return Figure(
        title=f"{a} and {b}: which samples conflict",
        plot=plot(
            data,
            round(step * height) + 60,
            margin={"l": 8, "r": 8, "t": 8, "b": 8},
            showlegend=False,
            xaxis=axis(
                range=[-0.35, 1.35], tickvals=[0, 1], ticktext=[label(name) for name in names], side="top",
                showgrid=False, showline=False, ticks="", fixedrange=True,
            ),
            yaxis=axis(
                "samples, by cluster", range=[height - 0.25, -0.75], showticklabels=False, showgrid=False,
                showline=False, ticks="", fixedrange=True,
            ),
        ),
        caption=f"Each dot is a sample, {a} on the left, {b} on the right; each line a pair that was found "
        "to conflict, thicker the further it lies below samples of one task. Colours are clusters, grey "
        f"joins two.{cut}",
        wide=True,
    )  # fmt: skip


def _strongest(pairs: pd.DataFrame) -> pd.DataFrame:
    """The strongest pairs that keep within the limits of samples and lines."""
    ordered = pairs.sort_values("excess", kind="stable")
    seen: set[tuple[str, str]] = set()
    kept: list[int] = []
    for place, (left, right) in enumerate(zip(ordered["sample_a"], ordered["sample_b"], strict=True)):
        more = {("a", left), ("b", right)} - seen
        if len(seen) + len(more) <= _MOST_NODES:
            seen |= more
            kept.append(place)
        if len(kept) == _MOST_LINES:
            break
    return ordered.iloc[kept]


def _nodes(pairs: pd.DataFrame, clusters: pd.DataFrame) -> dict[tuple[str, str], _Node]:
    """Samples with their places: clusters below each other, the samples of either side centred in each."""
    cluster = {side: _cluster_of(pairs, clusters, side) for side in "ab"}
    degree = {side: pairs[f"sample_{side}"].value_counts().to_dict() for side in "ab"}
    nodes: dict[tuple[str, str], _Node] = {}
    top = 0.0
    for number in sorted({c for side in "ab" for c in cluster[side].values()}):
        members = {
            side: sorted((s for s, c in cluster[side].items() if c == number), key=lambda s: -degree[side][s])
            for side in "ab"
        }
        band = max(map(len, members.values()))
        for side, names in members.items():
            texts = _texts(pairs, side)
            for place, name in enumerate(names):
                y = top + (place + 0.5) * band / len(names) - 0.5
                nodes[side, name] = _Node(side, name, number, degree[side][name], texts.get(name, ""), y)
        top += band + 0.6
    return nodes


def _cluster_of(pairs: pd.DataFrame, clusters: pd.DataFrame, side: str) -> dict[str, int]:
    """Cluster of each sample of a side; those of none come last."""
    names = pairs[f"sample_{side}"].unique().tolist()
    found: dict[str, int] = {}
    for row in clusters.to_dict("records"):
        members = set(row[f"members_{side}"].split("; "))
        found |= {name: int(row["cluster"]) for name in names if name in members}
    return {name: found.get(name, len(clusters)) for name in names}


def _texts(pairs: pd.DataFrame, side: str) -> dict[str, str]:
    if f"text_{side}" not in pairs:
        return {}
    once = pairs.drop_duplicates(f"sample_{side}")
    texts = zip(once[f"sample_{side}"], once[f"text_{side}"], strict=True)
    return {name: _clip(" ".join(text.split()), _TEXT) for name, text in texts if isinstance(text, str)}


def _lines(pairs: pd.DataFrame, nodes: dict[tuple[str, str], _Node]) -> list[PlotlyDict]:
    """Lines of one colour and strength make one trace."""
    weight = (-pairs["excess"].to_numpy(np.float64)).clip(0)
    weight = np.nan_to_num(weight / weight.max() if len(weight) and weight.max() > 0 else weight)
    traces: dict[tuple[int, int], PlotlyDict] = {}
    for w, left, right in zip(weight, pairs["sample_a"], pairs["sample_b"], strict=True):
        one, two = nodes["a", left], nodes["b", right]
        color = _color(one.cluster) if one.cluster == two.cluster else _GREY
        step = min(int(w * _STEPS), _STEPS - 1)
        trace = traces.setdefault((color, step), _line(color, step))
        trace["x"] += [0, 1, None]
        trace["y"] += [rounded(one.y), rounded(two.y), None]
    return [traces[key] for key in sorted(traces, key=lambda key: key[1])]


def _line(color: int, step: int) -> PlotlyDict:
    return {
        "type": "scatter", "mode": "lines", "x": [], "y": [], "hoverinfo": "skip",
        "line": {"color": CATEGORIES[color], "width": 0.6 + 0.6 * step},
        "opacity": round(0.3 + 0.5 * step / (_STEPS - 1), 2),
    }  # fmt: skip


def _middles(pairs: pd.DataFrame, nodes: dict[tuple[str, str], _Node]) -> PlotlyDict:
    """Points that are not seen, a quarter along each line, for the hover text of pairs."""
    custom: list[list[Any]] = []
    y = []
    for row in pairs.to_dict("records"):
        one, two = nodes["a", row["sample_a"]], nodes["b", row["sample_b"]]
        y.append(one.y + (two.y - one.y) / 4)
        numbers = [rounded(row[c]) for c in ("cosine", "effect_size", "q")]
        custom.append([label(row["sample_a"]), label(row["sample_b"]), *numbers])
    return {
        "type": "scatter", "mode": "markers", "x": [0.25] * len(y), "y": column(y), "customdata": custom,
        "marker": {"size": 7, "opacity": 0},
        "hovertemplate": "%{customdata[0]} and %{customdata[1]}<br>cosine %{customdata[2]:+.3f}, "
        "d %{customdata[3]:.2f}, q %{customdata[4]:.2g}<extra></extra>",
    }  # fmt: skip


def _side(nodes: dict[tuple[str, str], _Node], side: str, step: float) -> PlotlyDict:
    """The samples of one task; their names stand beside them where there is room."""
    mine = [node for node in nodes.values() if node.side == side]
    named = step >= 11
    return {
        "type": "scatter",
        "mode": "markers+text" if named else "markers",
        "x": [0 if side == "a" else 1] * len(mine),
        "y": column(node.y for node in mine),
        "text": [label(_clip(node.name)) if named else "" for node in mine],
        "textposition": "middle left" if side == "a" else "middle right",
        "textfont": {"size": 11},
        "customdata": [
            [
                label(node.name),
                node.cluster,
                counted(node.pairs, "found pair"),
                f"<br>{label(node.text)}" if node.text else "",
            ]
            for node in mine
        ],
        "marker": {
            "size": round(max(4.0, min(10.0, step * 0.6)), 1),
            "color": [CATEGORIES[_color(node.cluster)] for node in mine],
        },
        "hovertemplate": "%{customdata[0]}<br>cluster %{customdata[1]}, %{customdata[2]} here"
        "%{customdata[3]}<extra></extra>",
    }


def _color(cluster: int) -> int:
    return min(cluster, _GREY)


def _clip(text: str, most: int = _NAME) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
