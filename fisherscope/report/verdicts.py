"""What the tests of conflict amount to, for readers who know no statistics."""

from __future__ import annotations

from dataclasses import dataclass

from fisherscope.analyses import Result
from fisherscope.analyses.conflict import ConflictResult
from fisherscope.report.markup import Html, join, tag


@dataclass(frozen=True)
class _Sign:
    name: str
    title: str
    meaning: str
    outline: str
    glyph: str


# Told apart by words and by shape, not by colour alone: a triangle, a circle, a dashed square.
_SIGNS = {
    "found": _Sign(
        "found",
        "Conflict found",
        "the two tasks, or some of their samples, pull parts of the model in opposite directions, more than "
        "chance explains. Slight: on average alone, and by little.",
        "M12 2.8 22 20.6H2z",
        "M12 9v5.2M12 16.8v1.2",
    ),
    "nothing found": _Sign(
        "nothing",
        "Nothing found",
        "the tests work on this data, and conflicts of the strength given would have shown. Weaker ones may "
        "be there.",
        "M12 2.5a9.5 9.5 0 1 0 0 19 9.5 9.5 0 1 0 0-19z",
        "M7.6 12.4l3 3 5.8-6.4",
    ),
    "cannot tell": _Sign(
        "unknown",
        "Cannot tell",
        "the data does not allow an answer, neither that there is a conflict nor that there is none.",
        "M3.5 3.5h17v17h-17z",
        "M9 9.6c0-3.8 6-3.6 6 0 0 2.2-3 2.2-3 4.6M12 16.6v1.2",
    ),
}


def verdicts(result: Result) -> Html:
    """A badge and a reason per pair of tasks, and what the badges mean; nothing for other results."""
    if not isinstance(result, ConflictResult) or result.extra["verdicts"].empty:
        return Html("")
    rows = result.extra["verdicts"].to_dict("records")
    items = [
        tag(
            "li",
            tag(
                "div",
                badge(row["verdict"], slight=row["slight"]),
                tag("b", f"{row['task_a']} and {row['task_b']}"),
            ),
            tag("p", row["reason"]),
            class_=f"verdict {_SIGNS[row['verdict']].name}{' slight' if row['slight'] else ''}",
        )
        for row in rows
    ]
    used = [sign for word, sign in _SIGNS.items() if any(row["verdict"] == word for row in rows)]
    legend = [tag("span", tag("b", f"{sign.title}:"), f" {sign.meaning} ") for sign in used]
    return join([tag("ul", *items, class_="verdicts"), tag("p", *legend, class_="note")])


def badge(verdict: str, *, slight: bool = False) -> Html:
    """A verdict as a shape and words."""
    sign = _SIGNS[verdict]
    title = f"Slight {sign.title[0].lower()}{sign.title[1:]}" if slight else sign.title
    icon = tag(
        "svg", tag("path", d=sign.outline), tag("path", d=sign.glyph), viewBox="0 0 24 24", aria_hidden="true"
    )
    return tag("span", icon, title, class_=f"badge {sign.name}")
