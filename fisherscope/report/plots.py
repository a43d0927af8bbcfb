"""Figures inside the page: as JSON that cannot end its script element, within a budget of bytes."""

from __future__ import annotations

import json
from typing import Any

from fisherscope.analyses.result import strict
from fisherscope.report.figures import Figure
from fisherscope.report.figures.scales import SCALES
from fisherscope.report.markup import Html, join, tag

BUDGET = 3_500_000
"""Bytes of figures on a page; with plotly.js (4.8 MB), tables and texts it stays below 10 MB."""

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def embedded_json(value: Any) -> str:
    """JSON for a script element: nothing in it reads as markup or as a line end, NaN becomes null."""
    text = json.dumps(strict(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


class Plots:
    """The figures of a page, numbered as they are added."""

    def __init__(self, budget: int = BUDGET) -> None:
        """Start without figures; ``budget`` in bytes."""
        self.left = budget
        self._scripts: list[Html] = []

    def __len__(self) -> int:
        return len(self._scripts)

    def add(self, figure: Figure) -> Html:
        """Take in a figure.

        Returns:
            The element that it is drawn into, or a note where the budget is spent.
        """
        text = embedded_json(figure.plot)
        cost = len(text.encode(errors="backslashreplace"))
        if cost > self.left:
            return tag(
                "p",
                "Left out to keep this page small: the tables have all its numbers.",
                class_="box skipped",
            )
        self.left -= cost
        number = len(self._scripts)
        self._scripts.append(tag("script", Html(text), type="application/json", id=f"figure-{number}"))
        height = int(figure.plot["layout"].get("height", 320))
        return tag(
            "div",
            class_="plot",
            data_figure=number,
            style=f"min-height:{height}px",
            role="img",
            aria_label=figure.title,
        )

    def scripts(self) -> Html:
        """The data of all figures and the colour scales of both themes."""
        return join(
            [tag("script", Html(embedded_json(SCALES)), type="application/json", id="scales"), *self._scripts]
        )
