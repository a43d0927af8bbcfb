"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files as resources
from string import Template
from typing import TYPE_CHECKING

from fisherscope.report.markup import Html, esc, join, tag
from fisherscope.report.plots import Plots
from fisherscope.report.sections import (
    Section,
    analysis_section,
    coverage_section,
    run_section,
    summary_section,
)
from fisherscope.words import counted

if TYPE_CHECKING:
    from fisherscope.report.facts import Facts
    from fisherscope.report.report import Report


def render(report: Report, tables: Mapping[str, Mapping[str, str]]) -> str:
    """The page of a report.

    Args:
        report: the report.
        tables: per analysis, table name -> CSV file, for pointing to them.

    Returns:
        HTML with style, scripts, plotly.js and all data inside.
    """
    plots = Plots()
    sections = [
        summary_section(report.outcomes),
        run_section(report.facts),
        coverage_section(report.facts),
        *(
            analysis_section(name, outcome, tables.get(name, {}), plots)
            for name, outcome in report.outcomes.items()
        ),
    ]
    return Template(_asset("template.html")).substitute(
        title=esc(f"{report.facts.model}: {', '.join(report.facts.tasks['task'])}"),
        style=_asset("style.css"),
        header=_header(report.facts),
        contents=join(tag("li", _link(section)) for section in sections),
        sections=join(map(_section, sections)),
        figures=plots.scripts(),
        plotly=_plotly() if len(plots) else "",
        script=_asset("page.js"),
    )


def _header(facts: Facts) -> Html:
    tasks = [
        tag("li", tag("b", row["task"]), f" {counted(row['samples'], 'sample')}")
        for row in facts.tasks.to_dict("records")
    ]
    return join([
        tag("p", "fisherscope report", class_="brand"),
        tag("h1", facts.model),
        tag("ul", *tasks, class_="tasks"),
    ])  # fmt: skip


def _link(section: Section) -> Html:
    mark = tag("span", section.status, class_=f"mark {section.status}") if section.status else Html("")
    return tag("a", section.title, mark, href=f"#{section.key}")


def _section(section: Section) -> Html:
    return tag("section", tag("h2", section.title), section.body, id=section.key)


def _asset(name: str) -> str:
    return (resources("fisherscope.report") / "assets" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")
