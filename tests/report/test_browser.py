"""The page in headless Chromium: it draws, it runs nothing of the samples', it asks for nothing."""

import os
import shutil
import time

import pytest

from fisherscope.report import Report
from fisherscope.report.page import render
from tests.report.conflicts import make_conflict
from tests.report.conftest import QUICK

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    """A browser. Absent in CI it is a failure, elsewhere the tests are skipped."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI", "").lower() in {"1", "true"}:
            pytest.fail("no Chromium in CI: install it with `apt-get install chromium`")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Opened:
    """A page that was opened: what it asked for, and what it complained about."""

    def __init__(self, chromium, file, **options):
        self.context = chromium.new_context(**options)
        self.page = self.context.new_page()
        self.requests, self.problems = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(file.as_uri())
        self.until("document.documentElement.dataset.drawn !== undefined")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()

    def until(self, expression, seconds=60):
        """Wait for an expression; playwright's own way needs eval, which the page's policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def count(self, selector):
        return self.page.locator(selector).count()


def test_every_figure_draws_and_nothing_else_happens(chromium, saved):
    """All figures are drawn, no script of a sample ran, the console is silent, one file was read.

    The page fits the window.
    """
    file = saved.directory / "report.html"
    with Opened(chromium, file, viewport={"width": 1280, "height": 900}) as opened:
        places = opened.count("[data-figure]")
        assert places == 31
        assert opened.count(".js-plotly-plot .main-svg:first-child") == places
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1280
        drawn = "place => place.querySelector('.trace, .hm, .bars') !== null"
        assert opened.page.locator(".plot").evaluate_all(f"all => all.every({drawn})")
        opened.page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        assert "window.pwned=1" in opened.page.locator("#summary, #analysis-conflict").all_inner_texts()[-1]
        assert opened.page.evaluate("window.pwned === undefined")
        assert opened.requests == [file.as_uri()]
        assert opened.problems == []


TICKS = """
() => [...document.querySelectorAll('.js-plotly-plot')].flatMap((plot, number) => {
  const found = {};
  plot.querySelectorAll('[class$="tick"] text').forEach(text => {
    const axis = text.parentElement.getAttribute('class');
    (found[axis] = found[axis] || []).push(text.textContent);
  });
  return Object.entries(found).map(([axis, texts]) => [number, axis, texts]);
})
"""


def test_no_axis_has_two_ticks_that_read_the_same(chromium, saved):
    """Of no axis and of no colour bar."""
    with Opened(chromium, saved.directory / "report.html", viewport={"width": 1280, "height": 900}) as opened:
        axes = opened.page.evaluate(TICKS)
        assert len(axes) > 60
        assert any("coloraxis" in axis for _, axis, _ in axes)
        assert [axis for axis in axes if len(set(axis[2])) < len(axis[2])] == []


def test_the_page_fits_a_phone(chromium, saved):
    """The page does not scroll sideways: panels rearrange when it is narrow."""
    file = saved.directory / "report.html"
    with Opened(chromium, file, viewport={"width": 390, "height": 800}) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert opened.problems == []


def test_dark_pages_have_light_text_in_figures(chromium, saved):
    """Figures follow the colour scheme, also when it changes while the page is open."""
    file = saved.directory / "report.html"
    ink = "getComputedStyle(document.querySelector('.plot .annotation-text')).fill"
    with Opened(chromium, file, color_scheme="dark", viewport={"width": 1280, "height": 800}) as opened:
        dark = opened.page.evaluate(ink)
        opened.page.emulate_media(color_scheme="light")
        opened.until(f"{ink} !== '{dark}'")
        assert opened.problems == []


def test_hover_names_the_slice(chromium, saved):
    """Pointing at a cell says layer, block, head and value."""
    with Opened(chromium, saved.directory / "report.html", viewport={"width": 1280, "height": 900}) as opened:
        opened.page.locator("#analysis-fisher .plot").first.scroll_into_view_if_needed()
        box = opened.page.locator("#analysis-fisher .plot .subplot.xy").first.bounding_box()
        opened.page.mouse.move(box["x"] + 20, box["y"] + 20)
        text = opened.page.locator(".hoverlayer .hovertext").first.text_content()
        assert "layer 0, Q head 0" in text
        assert "F " in text


@pytest.fixture(scope="module")
def conflict_page(saved, tmp_path_factory):
    """A page with findings, and hostile names, ids, tokens and texts."""
    file = tmp_path_factory.mktemp("conflict") / "report.html"
    page = render(Report({"conflict": make_conflict()}, saved.report.facts, QUICK), {})
    file.write_text(page, encoding="utf-8")
    return file


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_the_conflict_section_draws_and_runs_nothing(chromium, conflict_page, scheme, width):
    """Network, maps, calibration and spread draw in both themes; the badges show; no name or token runs."""
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with Opened(chromium, conflict_page, **options) as opened:
        assert opened.count("[data-figure]") == opened.count(".js-plotly-plot .main-svg:first-child") == 10
        assert opened.page.locator(".verdict .badge").all_inner_texts() == [
            "Conflict found", "Nothing found", "Cannot tell",
        ]  # fmt: skip
        colors = "all => new Set(all.map(one => getComputedStyle(one).color)).size"
        assert opened.page.locator(".verdict .badge").evaluate_all(colors) == 3
        opened.page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        assert opened.count("mark.s4") == 2
        assert "window.pwned=1" in opened.page.locator("mark.s4").first.inner_text()
        assert opened.page.evaluate("window.pwned === undefined")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.requests == [conflict_page.as_uri()]
        assert opened.problems == []


def test_hover_in_the_network_names_the_sample(chromium, conflict_page):
    """Pointing at a dot of the network shows its id, its cluster and its text, as text."""
    with Opened(chromium, conflict_page, viewport={"width": 1280, "height": 900}) as opened:
        plot = opened.page.locator("#analysis-conflict .plot").first
        plot.scroll_into_view_if_needed()
        box = plot.locator(".trace .points path").last.bounding_box()
        opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        text = opened.page.locator(".hoverlayer .hovertext").first.text_content()
        assert "found pairs here" in text
        assert "window.pwned=1" in text
        assert opened.page.evaluate("window.pwned === undefined")
        assert opened.problems == []
