"""Building HTML out of text that nobody trusts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from fisherscope.words import counted

CLIP = 100
"""Characters of a text that show before it is opened."""

LONGEST = 6000
"""Characters of a text that the page holds; the tables hold all."""


class Html(str):
    """Text that is HTML already. Everything else is escaped by :func:`esc`."""

    __slots__ = ()


def esc(value: object) -> Html:
    """HTML for a value: itself if it is :class:`Html`, else its text, escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; children and attributes are escaped. ``class_`` is ``class``, ``data_x`` is ``data-x``."""
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{''.join(pairs)}>{''.join(map(esc, children))}</{name}>")


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Parts one after the other, each escaped unless it is HTML."""
    return Html(esc(separator).join(map(esc, parts)))


def grid(
    header: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[bool], caption: object = ""
) -> Html:
    """A table in a box that scrolls sideways.

    Args:
        header: one text per column.
        rows: cells, escaped unless they are HTML.
        numeric: which columns are aligned as numbers.
        caption: above the table.
    """
    classes = ["n" if is_number else None for is_number in numeric]
    head = tag(
        "tr", *(tag("th", text, class_=c, scope="col") for text, c in zip(header, classes, strict=True))
    )
    body = (
        tag("tr", *(tag("td", cell, class_=c) for cell, c in zip(row, classes, strict=True))) for row in rows
    )
    title = tag("caption", caption) if caption else Html("")
    table = tag("table", title, tag("thead", head), tag("tbody", *body))
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")


def sample_text(text: object) -> Html:
    """A sample's text as it is, clipped where it is long; opening it shows the rest."""
    if not isinstance(text, str):
        return tag("span", "no text", class_="none")
    if len(text) <= CLIP + 20:
        return tag("pre", text, class_="sample")
    rest = text[:LONGEST]
    if len(text) > LONGEST:
        more = len(text) - LONGEST
        rest += f"\n[... {counted(more, 'more character')} in the CSV tables of a report]"
    return tag(
        "details",
        tag(
            "summary", tag("span", text[:CLIP] + " \N{HORIZONTAL ELLIPSIS}", class_="clip"), title=text[:1000]
        ),
        tag("pre", rest, class_="sample"),
        class_="sample",
    )
