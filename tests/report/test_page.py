"""The page as text: what it holds, what it never holds."""

import re
from html.parser import HTMLParser

import pandas as pd

import fisherscope as fs
from fisherscope.report import register_figures
from fisherscope.report.figures import Figure, registry
from fisherscope.report.page import render
from fisherscope.report.plots import Plots, embedded_json
from tests.report.conftest import HOSTILE, QUICK, Plain


class Reader(HTMLParser):
    """Elements, their attributes and the text outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.inside = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in {"script", "style"}:
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def test_the_page_loads_nothing(saved):
    """Under 10 MB, with a policy that forbids the network, and no element or style that asks for it."""
    page = saved.page
    assert len(page.encode()) < 10_000_000
    reader = Reader(page)
    assert not [e for e in reader.elements if e[0] in {"link", "img", "iframe", "object", "embed", "base"}]
    assert not [a for _, a in reader.elements if {"src", "srcset", "data", "action", "onerror"} & a.keys()]
    hrefs = [a["href"] for _, a in reader.elements if "href" in a]
    assert hrefs
    assert all(href.startswith("#") for href in hrefs)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert not re.search(r"@import|url\(|https?:", style)
    (policy,) = [a["content"] for t, a in reader.elements if t == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy
    assert "http" not in policy.replace("http-equiv", "")


def test_every_part_is_there(saved):
    """Words, run, coverage and a section per analysis, all in the table of contents."""
    reader = Reader(saved.page)
    ids = [a["id"] for t, a in reader.elements if t == "section"]
    assert ids == ["summary", "run", "coverage", *(f"analysis-{name}" for name in saved.report)]
    assert [a["href"] for _, a in reader.elements if a.get("href", "").startswith("#")][: len(ids)] == [
        f"#{one}" for one in ids
    ]
    for words in ("Which heads matter to which task", "Where one task stresses another", "kv head", "tiny"):
        assert words in reader.words
    for result in saved.report.values():
        for line in result.summary().splitlines():
            assert line in reader.words


def test_texts_are_escaped(saved):
    """A script in a sample is text on the page; long texts are clipped and open; nothing is run together."""
    page = saved.page
    assert HOSTILE not in page
    assert "window.pwned" in Reader(page).words
    assert not [a for t, a in Reader(page).elements if t == "img" or "onerror" in a]
    assert "long \u2028 text" in page
    assert page.count('<details class="sample"') > 0
    for number in range(page.count("<script")):
        script = page.split("<script")[number + 1]
        assert "</script>" in script


def test_a_store_without_texts_shows_none(saved, lean):
    """With ``store_text=False`` no text is in the page, the results or the tables."""
    for file in lean.directory.rglob("*"):
        if file.is_file():
            content = file.read_text(encoding="utf-8")
            assert "window.pwned" not in content
            assert "text_a" not in content
            assert "long \u2028" not in content
    assert "window.pwned" in (saved.directory / "tables" / "conflict.csv").read_text(encoding="utf-8")


def test_skipped_and_failed_sections(lean, plugin, tmp_path):
    """A skipped section says what to collect; a failed one shows error and traceback; both are announced."""

    def broken(store, config, context):
        raise RuntimeError("no <b>moon</b>")

    plugin("broken", broken)
    report = fs.analyze(lean.report.store_path, ["broken", "conflict", "fisher"], QUICK)
    page = (report.save(tmp_path) / "report.html").read_text(encoding="utf-8")
    reader = Reader(page)
    assert "no <b>moon</b>" in reader.words
    assert "no <b>moon</b>" not in page
    assert "Traceback (most recent call last)" in reader.words
    assert "collect again" in reader.words
    assert "Conflicting samples skipped" in reader.words
    assert "Broken failed" in reader.words
    assert "Fisher information of every head slice" in reader.words


def test_a_plugin_gets_its_table_and_can_have_figures(saved, plugin, monkeypatch):
    """Without a registered figure the table shows; with one it is drawn; a figure that fails is said."""

    class Losses(Plain):
        pass

    frame = pd.DataFrame({"sample": ["<i>one</i>"], "loss": [0.25]})
    plugin("losses", lambda store, config, context: Losses(name="losses", config={}, frame=frame))
    report = fs.analyze(saved.report.store_path, ["losses"], QUICK)
    page = render(report, {})
    assert "&lt;i&gt;one&lt;/i&gt;" in page
    assert "0.250" in page
    assert "Losses were counted." in page
    assert 'class="plot"' not in page
    assert len(page) < 100_000  # plotly.js is there only for figures
    monkeypatch.setattr(registry, "_DRAWERS", dict(registry._DRAWERS))
    draws = register_figures(Losses)
    draws(lambda result: [Figure("A figure", {"data": [], "layout": {}}, "of <losses>")])
    page = render(report, {})
    assert 'class="plot"' in page
    assert "of &lt;losses&gt;" in page
    registry._DRAWERS[Losses] = lambda result: 1 / 0
    page = render(report, {})
    assert "ZeroDivisionError" in page
    assert "&lt;i&gt;one&lt;/i&gt;" in page


def test_embedded_data_cannot_end_its_script():
    """Angle brackets, line separators and NaN survive as JSON that HTML and JavaScript read as data."""
    text = embedded_json({"a": "</script>\u2028\u2029&", "b": float("nan")})
    assert not set("<>&\u2028\u2029") & set(text)
    assert '"b":null' in text


def test_figures_beyond_the_budget_are_announced():
    """A page stays small: what does not fit is said in its place, and the rest is drawn."""
    plots = Plots(budget=100)
    small = {"data": [], "layout": {"height": 1}}
    big = {"data": [{"x": list(range(100))}], "layout": {}}
    assert "plot" in plots.add(Figure("small", small))
    assert "tables" in plots.add(Figure("big", big))
    assert len(plots) == 1
