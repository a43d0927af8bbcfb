"""Colours of the figures.

Heat maps use scales of even steps in lightness (OKLab), in the two forms that the page switches between:
pale to dark on a light page, dark to pale on a dark one.
"""

from __future__ import annotations

SEQUENTIAL = {
    "light": [
        "#f4f5e6", "#c8e3ad", "#87d294", "#13bf92", "#099f95", "#09808d", "#026380", "#024673", "#1c2c51",
    ],
    "dark": [
        "#1c2338", "#053b66", "#015773", "#057480", "#0b9289", "#03b285", "#6eca78", "#b9db81", "#efecad",
    ],
}  # fmt: skip
"""For values from 0 upwards."""

DIVERGING = {
    "light": [
        "#a12a07", "#ba614b", "#d19282", "#e4c2ba", "#f3f3f3", "#b8cee5", "#7da8d4", "#4082c3", "#025da1",
    ],
    "dark": [
        "#f99262", "#c07654", "#895a45", "#564036", "#262626", "#344857", "#406d8c", "#4893c5", "#53bbfe",
    ],
}  # fmt: skip
"""For signed values, centred at 0: orange below, blue above."""

SCALES = {"sequential": SEQUENTIAL, "diverging": DIVERGING}

CATEGORIES = ["#3f86c8", "#d87a32", "#2f9f7b", "#a070c8", "#c8567a", "#8f8a3c", "#4f9fb0", "#8a8a8a"]
"""Tasks, pairs, blocks: legible on light and dark pages."""

BLOCK_COLORS = {"Q": "#3f86c8", "K": "#2f9f7b", "V": "#d87a32", "O": "#a070c8"}


def colorscale(name: str, theme: str = "light") -> list[list[float | str]]:
    """A plotly colour scale: pairs of position and colour.

    Args:
        name: "sequential" or "diverging".
        theme: "light" or "dark".
    """
    colors = SCALES[name][theme]
    return [[i / (len(colors) - 1), color] for i, color in enumerate(colors)]


def category(number: int) -> str:
    """Colour of the n-th task, pair or block; they repeat after a while."""
    return CATEGORIES[number % len(CATEGORIES)]
