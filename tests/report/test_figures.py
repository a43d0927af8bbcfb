"""Figures are valid plotly, labelled, and say which heads they mean."""

import re

import numpy as np
import plotly.graph_objects as go
import pytest

from fisherscope.report.figures import figures_of
from fisherscope.report.figures.maps import head_map
from fisherscope.report.figures.parts import cell, count_axis
from fisherscope.report.figures.scales import SCALES
from fisherscope.report.figures.ticks import log_ticks, share_ticks

COUNTS = {"fisher": 4, "importance": 6, "masks": 3, "overlap": 4, "conflict": 8, "interference": 6}


@pytest.mark.parametrize("name", COUNTS)
def test_figures_are_valid_and_labelled(saved, name):
    """Plotly accepts every key; each figure has a title in words, and its axes and hover texts are there."""
    figures = figures_of(saved.report[name])
    assert len(figures) == COUNTS[name]
    for figure in figures:
        go.Figure(figure.plot)
        assert figure.title
        assert figure.caption
        layout = figure.plot["layout"]
        titles = [axis["title"]["text"] for key, axis in layout.items() if key[1:5] == "axis"]
        assert any(titles)
        assert all("hovertemplate" in trace or trace["hoverinfo"] == "skip" for trace in figure.plot["data"])


def test_maps_show_kv_heads(saved, layout):
    """K and V have one column per kv head and say so; Q and O one per query head; values are the frame's."""
    result = saved.report["fisher"]
    figure = figures_of(result)[0]
    panels = {}
    for number, trace in enumerate(figure.plot["data"], 1):
        axis = figure.plot["layout"][f"xaxis{number if number > 1 else ''}"]
        panels["QKVO"[number - 1]] = (len(trace["x"]), axis["title"]["text"], trace)
    assert {name: panel[:2] for name, panel in panels.items()} == {
        "Q": (4, "head"), "K": (2, "kv head"), "V": (2, "kv head"), "O": (4, "head"),
    }  # fmt: skip
    assert "2 kv heads, each shared by 2 query heads" in figure.caption
    expected = result.data["mean"].sel(task="math", layer=1, block="O", head=3).item()
    assert panels["O"][2]["customdata"][1][3][0] == pytest.approx(expected, rel=1e-3)
    assert panels["O"][2]["z"][0] != panels["O"][2]["z"][1]


def test_a_map_of_zeros_and_gaps(saved):
    """Zeros on a logarithmic scale and missing values stay blank instead of failing."""
    frame = saved.report["fisher"].frame
    rows = frame[(frame["kind"] == "head") & (frame["part"] == "weight") & (frame["task"] == "math")]
    rows = rows.rename(columns={"index": "head"}).assign(mean=0.0)
    go.Figure(head_map(rows, "mean", "F", log=True))
    plot = head_map(rows.assign(mean=float("nan")), "mean", "F", scale="diverging")
    assert plot["data"][0]["z"][0][0] is None


def test_interference_draws_what_tells_tasks_apart(saved):
    """With the F of the first task its C / F averages to 1: the map is of the demanding samples."""
    result = saved.report["interference"]
    figure = figures_of(result)[0]
    assert "5% of math's samples exceed" in figure.title
    rows = result.frame[(result.frame["task_a"] == "math") & (result.frame["task_b"] == "code")]
    assert figure.plot["layout"]["coloraxis"]["cmax"] == pytest.approx(rows["sample_q95"].max())


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_scales_are_even_in_lightness(theme):
    """Sequential colours change lightness in one direction, diverging ones on both sides of the middle."""

    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light = [luminance(c) for c in SCALES["sequential"][theme]]
    assert light == sorted(light, reverse=theme == "light")
    both = [luminance(c) for c in SCALES["diverging"][theme]]
    assert both[:5] == sorted(both[:5], reverse=theme == "dark")
    assert both[4:] == sorted(both[4:], reverse=theme == "light")


@pytest.mark.parametrize(("low", "high"), [(1e-12, 1e-2), (2e-5, 3e-5), (1.0, 1.0), (3e-9, 8e-8)])
def test_log_ticks_lie_inside(low, high):
    """A few ticks, all within the data, whatever its range."""
    places, texts = log_ticks(low, high)
    assert 1 <= len(places) == len(texts) <= 12
    assert all(low * 0.99 <= 10**place <= high * 1.01 for place in places)


@pytest.mark.parametrize("name", COUNTS)
def test_hovers_show_whole_numbers_whole(saved, name):
    """Plotly's own form of a number ("3.00", "12k") is for none: axes of text and given forms only; whole
    numbers in the data of a hover are whole, whatever their size."""
    for figure in figures_of(saved.report[name]):
        for trace in figure.plot["data"]:
            template = trace.get("hovertemplate", "")
            for letter in "xyz":
                if f"%{{{letter}}}" in template:
                    assert all(isinstance(value, str) for value in trace[letter]), template
            assert not re.search(r"%\{[^}]*:[^}]*s\}", template), template


def test_a_count_is_never_rounded():
    """12,345 entries are not 12,350; other numbers keep four digits, and texts lose their markup."""
    assert cell(12345) == 12345
    assert isinstance(cell(np.int64(7)), int)
    assert cell(0.123456) == 0.1235
    assert cell("<b>") == "&lt;b&gt;"
    assert cell(float("nan")) is None


def test_axes_of_counts_have_whole_ticks():
    """Few counts have one tick each, many as many as fit; none has a fraction or is written as 12k."""
    few, many = count_axis("pairs", 3), count_axis("pairs", 12000)
    assert few["tickformat"] == many["tickformat"] == ",d"
    assert few["dtick"] == 1
    assert "dtick" not in many


@pytest.mark.parametrize(
    "ends", [(1e-12, 0.9), (3e-11, 4e-11), (1.0001e-9, 1.0002e-9), (0.1, 0.1), (0.2, 0.3)]
)
def test_ticks_never_read_the_same(ends):
    """Shares of a billionth are not "0%" twice, nor near values "0.1" twice."""
    texts = share_ticks(*ends)["ticktext"]
    assert len(texts) == len(set(texts)) >= 1
    assert all(text.endswith("%") and float(text[:-1]) > 0 for text in texts)
    texts = log_ticks(*ends)[1]
    assert len(texts) == len(set(texts))
