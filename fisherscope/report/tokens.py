"""Texts of samples with the tokens marked that carry a conflict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from fisherscope.report.markup import CLIP, LONGEST, Html, join, tag
from fisherscope.report.numbers import signed

_SHADES = 4
_MOST_TOKENS = 800
# How tokenizers write the space before a word, and a line end.
_SPACES = str.maketrans({"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}": " ", "\N{LOWER ONE EIGHTH BLOCK}": " "})
_LINE_END = "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"


@dataclass(frozen=True)
class _Token:
    text: str
    contribution: float
    html: Html


def marked_text(positions: pd.DataFrame) -> Html:
    """The tokens of a sample, those that carry the conflict marked, the darker the more.

    Args:
        positions: rows of ``extra["positions"]`` of one side of a pair: position, token, contribution.

    Returns:
        The text, clipped around the token that carries most where it is long. Where tokens have no text, the
        positions that carry most. Nothing where no position carries conflict.
    """
    rows = positions.sort_values("position").head(_MOST_TOKENS)
    lowest = float(rows["contribution"].min()) if len(rows) else math.nan
    if not lowest < 0:
        return Html("")
    if rows["token"].isna().all():
        return _places(rows)
    tokens = _tokens(rows, lowest)
    strongest = min(range(len(tokens)), key=lambda k: tokens[k].contribution)
    if sum(len(token.text) for token in tokens) <= CLIP + 20:
        return tag("pre", *(token.html for token in tokens), class_="sample marked")
    first, last = _window(tokens, strongest, CLIP)
    shown = [token.html for token in tokens[first:last]]
    around = [
        "\N{HORIZONTAL ELLIPSIS} " if first else "",
        *shown,
        " \N{HORIZONTAL ELLIPSIS}" if last < len(tokens) else "",
    ]
    first, last = _window(tokens, strongest, LONGEST)
    rest = tag("pre", *(token.html for token in tokens[first:last]), class_="sample marked")
    return tag("details", tag("summary", tag("span", *around, class_="clip marked")), rest, class_="sample")


def _tokens(rows: pd.DataFrame, lowest: float) -> list[_Token]:
    known = rows["token"].fillna("\N{REPLACEMENT CHARACTER}")
    texts = [str(text).translate(_SPACES).replace(_LINE_END, "\n") for text in known]
    # tokens that carry no spaces of their own are words
    if not any(text != text.strip() for text in texts):
        texts = [text + " " for text in texts]
    return [
        _Token(text, float(value), _shaded(text, float(value), lowest))
        for text, value in zip(texts, rows["contribution"], strict=True)
    ]


def _shaded(text: str, value: float, lowest: float) -> Html:
    if not value < 0:
        return join([text])
    shade = max(1, math.ceil(value / lowest * _SHADES))
    return tag("mark", text, class_=f"s{shade}", title=f"contributes {signed(value)} to the cosine")


def _window(tokens: list[_Token], middle: int, most: int) -> tuple[int, int]:
    """The tokens around one, with so many characters in all."""
    first, last = middle, middle + 1
    length = len(tokens[middle].text)
    while length < most and (first > 0 or last < len(tokens)):
        if first > 0:
            first -= 1
            length += len(tokens[first].text)
        if last < len(tokens) and length < most:
            length += len(tokens[last].text)
            last += 1
    return first, last


def _places(rows: pd.DataFrame) -> Html:
    carrying = rows[rows["contribution"] < 0].sort_values("contribution", kind="stable").head(3)
    places = [f"{row['position']} ({signed(row['contribution'])})" for row in carrying.to_dict("records")]
    return tag("small", "carried most by positions ", ", ".join(places))
