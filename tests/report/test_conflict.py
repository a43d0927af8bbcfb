"""The conflict section: verdicts that anybody can read, figures and tables that show what was found."""

import dataclasses
import itertools
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from fisherscope.report import Report
from fisherscope.report.figures import figures_of
from fisherscope.report.figures.calibration import calibration, outcome
from fisherscope.report.figures.network import network
from fisherscope.report.markup import CLIP
from fisherscope.report.page import render
from fisherscope.report.tables import tables_of
from fisherscope.report.tokens import marked_text
from fisherscope.report.verdicts import verdicts
from tests.report.conflicts import FOUND, NAMES, REASONS, make_conflict
from tests.report.conftest import HOSTILE, QUICK
from tests.report.test_page import Reader


@pytest.fixture(scope="module")
def result():
    return make_conflict()


@pytest.fixture(scope="module")
def page(saved, result):
    return render(Report({"conflict": result}, saved.report.facts, QUICK), {})


def found_of(result):
    return result.frame[result.frame["found"]]


def test_verdicts_come_first_and_differ_in_words_and_shape(page):
    """Each pair of tasks has one of three badges, told apart without colour, and the reason beside it."""
    section = page[page.index('id="analysis-conflict"') :]
    assert section.index('class="verdicts"') < section.index('class="words"') < section.index('class="plot"')
    items = re.findall(r'<li class="verdict (\w+)">(.*?)</li>', section, re.DOTALL)
    assert [kind for kind, _ in items] == ["found", "nothing", "unknown"]
    words = ["Conflict found", "Nothing found", "Cannot tell"]
    for (_, item), word, reason in zip(items, words, REASONS.values(), strict=True):
        assert word in item
        assert reason in Reader(item).words
    shapes = [re.findall(r'<path d="([^"]*)"', item) for _, item in items]
    assert len({outline for outline, _ in shapes}) == len({glyph for _, glyph in shapes}) == 3


def test_badges_are_explained_where_they_occur(result):
    """A legend for the verdicts that are there and no others; results without verdicts have none."""
    assert "Cannot tell:" in verdicts(result)
    only = make_conflict()
    only.extra["verdicts"] = only.extra["verdicts"].head(1)
    assert "Conflict found:" in verdicts(only)
    assert "Cannot tell" not in verdicts(only)
    only.extra["verdicts"] = only.extra["verdicts"].head(0)
    assert verdicts(only) == ""


def test_the_summary_card_has_the_verdicts_and_the_surest_pair(page):
    """The first screen says per pair of tasks what was found, by number, or why nothing was."""
    card = Reader(page[page.index('class="card"') : page.index("</article>")]).words
    assert "14 pairs of samples, 2 samples against the other task, the tasks as a whole on 3 head" in card
    assert REASONS["cannot tell"] in card
    assert "Most certain: math_0 and" in card


def test_nothing_hostile_gets_through(page):
    """Names of tasks, ids, texts, tokens, sentences, reasons are text, in tables and in figures."""
    assert HOSTILE not in page
    assert "<img" not in page.replace("\\u003cimg", "")
    assert not [a for t, a in Reader(page).elements if t == "img" or "onerror" in a]
    assert "window.pwned=1" in Reader(page).words
    assert len(page.encode()) < 10_000_000


def lines_of(figure):
    """The drawn lines: (y left, y right, colour, width)."""
    found = []
    for trace in figure.plot["data"]:
        if trace["mode"] == "lines":
            for k in range(0, len(trace["x"]), 3):
                assert trace["x"][k : k + 3] == [0, 1, None]
                found.append((*trace["y"][k : k + 2], trace["line"]["color"], trace["line"]["width"]))
    return found


def nodes_of(figure):
    """Place and colour of the samples of either side, by id."""
    left, right = figure.plot["data"][-2:]
    sides = []
    for trace in (left, right):
        names = [custom[0] for custom in trace["customdata"]]
        sides.append(dict(zip(names, zip(trace["y"], trace["marker"]["color"], strict=True), strict=True)))
    return sides


def test_the_network_draws_every_found_pair(result):
    """A dot per sample, a line per found pair between its dots, clusters of one colour side by side."""
    figure = figures_of(result)[0]
    go.Figure(figure.plot)
    left, right = nodes_of(figure)
    assert set(left) == {f"math_{i}" for i, _ in FOUND}
    assert len(right) == len({j for _, j in FOUND})
    rights = dict(zip(sorted({j for _, j in FOUND}), [right[k] for k in sorted(right)], strict=True))
    expected = sorted((left[f"math_{i}"][0], rights[j][0]) for i, j in FOUND)
    assert sorted(line[:2] for line in lines_of(figure)) == expected
    grey = [line for line in lines_of(figure) if line[2] == "#8a8a8a"]
    assert [line[:2] for line in grey] == [(left["math_2"][0], rights[5][0])]
    for side in (left, right):
        colors = [color for _, color in sorted(side.values())]
        assert len(set(colors)) == 2
        assert sum(a != b for a, b in itertools.pairwise(colors)) == 1


def test_stronger_conflicts_have_thicker_lines(result):
    """Width grows with -excess."""
    pairs = found_of(result)
    figure = network(pairs, result.extra["clusters"])
    left, _ = nodes_of(figure)
    widths = {}
    for y, z, _, width in lines_of(figure):
        widths[y, z] = width
    _, right = nodes_of(figure)
    order = pairs.sort_values("excess")
    label = {
        name: name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        for name in order["sample_b"]
    }
    drawn = [
        widths[left[a][0], right[label[b]][0]]
        for a, b in zip(order["sample_a"], order["sample_b"], strict=True)
    ]
    assert drawn == sorted(drawn, reverse=True)
    assert drawn[0] > drawn[-1]


def test_a_large_network_is_cut_to_its_strongest_pairs_and_says_so():
    """At most 150 samples are drawn, of the strongest pairs; the page stays small."""
    rng = np.random.default_rng(0)
    i, j = np.unique(rng.integers(0, 400, (3000, 2)), axis=0).T
    pairs = pd.DataFrame({
        "task_a": "a", "task_b": "b", "sample_a": [f"a_{k}" for k in i], "sample_b": [f"b_{k}" for k in j],
        "cosine": -0.5, "excess": -rng.random(len(i)), "effect_size": 0.9, "q": 0.01, "found": True,
    })  # fmt: skip
    figure = network(pairs, pd.DataFrame(columns=["cluster", "members_a", "members_b"]))
    left, right = nodes_of(figure)
    assert 140 < len(left) + len(right) <= 150
    assert (
        f"Of {len(pairs):,} found pairs the {len(lines_of(figure)):,} strongest are drawn" in figure.caption
    )
    strongest = pairs.sort_values("excess").iloc[0]
    assert strongest["sample_a"] in left
    assert strongest["sample_b"] in right
    assert figure.plot["layout"]["height"] < 800


def test_maps_mark_the_slices_that_were_called(result):
    """A dot on each slice with q below the level and on no other; the caption says what it means."""
    maps = [figure for figure in figures_of(result) if "per head slice" in figure.title]
    assert len(maps) == 3
    go.Figure(maps[0].plot)
    marked = {
        (int(trace["y"][row]), "QKVO"[number], int(trace["x"][column]))
        for number, trace in enumerate(maps[0].plot["data"])
        for row, texts in enumerate(trace["text"])
        for column, text in enumerate(texts)
        if text
    }
    assert marked == {(0, "Q", 3), (1, "V", 1), (1, "O", 0)}
    assert "Dots:" in maps[0].caption
    assert not [text for trace in maps[1].plot["data"] for texts in trace["text"] for text in texts if text]
    assert "Dots:" not in maps[1].caption
    hover = maps[0].plot["data"][0]["hovertemplate"]
    assert all(word in hover for word in ("cosine", "excess", "t ", "p ", "q ", "margin"))


def test_interference_marks_what_the_test_of_overlap_called(saved):
    """The same dots for q of the test of overlap."""
    result = saved.report["interference"]
    frame = result.frame
    for figure, (_, rows) in zip(
        figures_of(result), frame.groupby(["task_a", "task_b"], sort=False), strict=True
    ):
        dots = sum(bool(text) for trace in figure.plot["data"] for texts in trace["text"] for text in texts)
        assert dots == (rows["q"] < 0.05).sum()
        assert ("Dots:" in figure.caption) == (dots > 0)


def test_the_calibration_panel_shows_all_p_values_and_the_outcome(result):
    """Bars are multiples of even p-values and average to 1; the words give the counts and what follows."""
    panels = [figure for figure in figures_of(result) if "calibrated" in figure.title]
    assert len(panels) == 3
    go.Figure(panels[0].plot)
    for trace in panels[0].plot["data"]:
        assert np.dot(trace["y"], trace["width"]) == pytest.approx(1, rel=1e-3)
    lines = panels[0].plot["layout"]["shapes"]
    assert [(line["y0"], line["y1"]) for line in lines] == [(1, 1)] * 3
    assert "pairs 0 of 20, heads 0 of 20, blocks 0 of 20; nothing speaks against" in panels[0].caption
    assert "The test of pairs called something in 4 of 20" in panels[2].caption
    assert "0.016: its q-values are withheld" in panels[2].caption
    assert "heads 0 of 20, blocks 0 of 20; nothing speaks against" in panels[2].caption
    assert "withheld" not in outcome(result.extra["calibration"].head(3).to_dict("records"))


def test_without_splits_there_is_no_panel(result):
    """A test that could not be tried has no histogram; where none could, there is no figure."""
    tests, bins = result.extra["calibration"].head(3), result.extra["calibration_p"].head(60)
    assert calibration(tests.assign(splits=0), bins) is None
    assert calibration(tests, bins.assign(count=0)) is None
    assert calibration(tests.head(0), bins.head(0)) is None
    some = calibration(tests, bins[bins["test"] == "pairs"])
    assert len(some.plot["data"]) == 1


def test_tables_of_found_pairs_findings_and_clusters(result):
    """Pairs with q, slice and interval; findings in sentences; clusters with members: all at first sight."""
    tables = tables_of(result)
    shown = Reader("".join(tables.shown)).words
    assert f"{len(FOUND)} pairs of samples in conflict" in shown
    first = found_of(result).iloc[0]
    assert f"{first['cosine']:+.3f}".replace("-", "−") in shown
    assert "95% interval" in shown
    assert "q 0.0100" in shown
    assert "Marked tokens carry the conflict" in shown
    assert "conflicts with code" in shown
    assert "Clusters of samples" in shown
    folded = Reader("".join(tables.folded)).words
    for title in (
        "none of them found to conflict", "oppose another task as a whole: 2", "Head slices where most pairs",
        "Parameters with the lowest", "Samples to drop", "Samples to weigh less", "An order to train in",
        "Samples to keep", "Only training tells",
    ):  # fmt: skip
        assert title in folded
        assert title not in shown


def test_a_list_that_takes_most_of_a_task_is_called_no_answer(result):
    """Where nearly every sample of a task would be dropped the page says that the tasks conflict."""
    assert "no answer" not in "".join(tables_of(result).folded)
    other = make_conflict()
    everybody = other.extra["reweight"].query("task == 'math'")[["sample", "task"]]
    other.extra["filter"] = everybody.assign(against="code", reason="", degree=0, mean_cosine=-0.1)
    assert "more than half of math: there the tasks conflict" in "".join(tables_of(other).folded)


def test_nothing_found_shows_no_advice():
    """Without a finding there is no network, no finding, no cluster and nothing to do."""
    result = make_conflict(found=[])
    result.extra["samples"] = result.extra["samples"].assign(direction=0)
    result.extra["filter"] = result.extra["filter"].head(0)
    result.extra["reweight"] = result.extra["reweight"].assign(weight=1.0)
    tables = tables_of(result)
    assert tables.shown == []
    assert "What to do about it" not in "".join(tables.folded)
    assert not [figure for figure in figures_of(result) if "which samples conflict" in figure.title]


def positions(tokens, values):
    return pd.DataFrame({"position": range(len(tokens)), "token": tokens, "contribution": values})


def test_tokens_that_carry_a_conflict_are_marked():
    """Every token with a contribution below 0 and no other, darker by its share of the strongest; escaped."""
    shown = marked_text(positions(["a", " <b>", " c", " d"], [-0.1, -0.4, 0.2, -0.21]))
    marks = re.findall(r'<mark class="s(\d)" title="([^"]*)">(.*?)</mark>', shown)
    assert [(int(shade), text) for shade, _, text in marks] == [(1, "a"), (4, " &lt;b&gt;"), (3, " d")]
    assert marks[1][1] == "contributes −0.400 to the cosine"
    assert Reader(shown).words == "a <b> c d"


def test_tokens_in_the_order_of_the_text_and_as_words():
    """Positions are put in order; spellings of spaces are spaces; bare words get some."""
    mixed = positions(["\u0120two", "one", "\u2581three\u010a"], [0.0, -0.1, 0.1]).iloc[[2, 1, 0]]
    mixed["position"] = [2, 0, 1]
    assert Reader(marked_text(mixed)).words == "one two three "
    assert Reader(marked_text(positions(["one", "two"], [-1.0, 0.0]))).words == "one two "


def test_long_samples_are_clipped_around_the_strongest_token():
    """What shows before opening holds the token that carries most; opening shows the rest."""
    values = np.full(300, 0.01)
    values[200] = -0.5
    shown = marked_text(positions([f" word{k}" for k in range(300)], values))
    closed, opened = shown.split("</summary>")
    assert "word200" in closed
    assert len(Reader(closed).words) < 2 * CLIP
    assert "word0 " in opened
    assert "word299" in opened


def test_tokens_without_texts_are_positions(page):
    """Without texts of tokens their positions are named; where none carries conflict there is nothing."""
    shown = Reader(marked_text(positions([None, None, None], [0.1, -0.2, -0.3]))).words
    assert shown == "carried most by positions 2 (−0.300), 1 (−0.200)"
    assert Reader(marked_text(positions([" a", None], [-0.1, -0.2]))).words == " a \ufffd"
    assert marked_text(positions(["a"], [0.1])) == ""
    assert marked_text(positions([], [])) == ""
    assert "carried most by positions 0 (−0.400), 2 (−0.100)" in Reader(page).words
    assert NAMES[0] in Reader(page).words


def test_slight_conflicts_are_not_shown_as_strong_ones(result):
    """What is found on average alone, and is small, has a badge that says so."""
    words = str(verdicts(result))
    assert "Slight conflict found" not in words
    table = result.extra["verdicts"]
    table = table.assign(slight=table["verdict"] == "found")
    words = str(verdicts(dataclasses.replace(result, extra={**result.extra, "verdicts": table})))
    assert words.count("Slight conflict found") == 1
    assert "verdict found slight" in words
