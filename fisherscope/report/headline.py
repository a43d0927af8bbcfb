"""What a reader wants to know in the first twenty seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fisherscope.analyses import Result
from fisherscope.analyses.conflict import ConflictResult
from fisherscope.analyses.importance import ImportanceResult
from fisherscope.analyses.interference import InterferenceResult
from fisherscope.analyses.overlap import OverlapResult
from fisherscope.analyses.units import slice_name
from fisherscope.report.markup import Html, esc, join, sample_text, tag
from fisherscope.report.numbers import percent, short, signed
from fisherscope.report.verdicts import badge
from fisherscope.words import counted, level

_MOST = 6


@dataclass(frozen=True)
class Card:
    """One finding.

    Attributes:
        title: the question it answers.
        body: the answer.
        section: analysis that holds the detail.
    """

    title: str
    body: Html
    section: str


def headline(report: Mapping[str, Result]) -> list[Card]:
    """The findings that the results of a report allow."""
    cards = []
    for name, result in report.items():
        if isinstance(result, ImportanceResult):
            cards.append(Card("Which heads matter to which task", _top_heads(result), name))
        elif isinstance(result, OverlapResult):
            cards.append(Card("Which heads the tasks share", _shared(result), name))
        elif isinstance(result, ConflictResult):
            cards.append(Card("Which samples oppose each other", _opposed(result), name))
        elif isinstance(result, InterferenceResult):
            cards.append(Card("Where one task stresses another", _stress(result), name))
    return [card for card in cards if card.body]


def _strong(text: object) -> Html:
    return tag("b", text)


def _top_heads(result: ImportanceResult) -> Html:
    lines = []
    for task in result.frame["task"].unique():
        rows = result.top(3, task=task).to_dict("records")
        best = [
            tag("span", _strong(slice_name(r, head="index")), f" {percent(r['global_share'])}", class_="one")
            for r in rows
        ]
        lines.append((task, join(best, ", ")))
    return _listed(lines, "Share of the Fisher score of all head slices.")


def _shared(result: OverlapResult) -> Html:
    regions, whole = result.extra["regions"], result.frame[result.frame["level"] == "all"]
    regions, whole = regions[regions["kind"] == "head"], whole[whole["kind"] == "head"]
    if whole.empty:
        return Html("")
    sparsity = whole["sparsity"].max()
    lines = []
    for row in whole[whole["sparsity"] == sparsity].to_dict("records"):
        both = regions[(regions["task_a"] == row["task_a"]) & (regions["task_b"] == row["task_b"])]
        both = both[both["sparsity"] == sparsity].sort_values("score", ascending=False, kind="stable")
        names = [_strong(slice_name(r, head="index")) for r in both.head(3).to_dict("records")]
        found = join(names, ", ") if names else esc("no head slice")
        text = f"Jaccard {row['jaccard']:.2f}, by chance {row['chance']:.2f}"
        lines.append((f"{row['task_a']} and {row['task_b']}", join([found, tag("small", text)])))
    return _listed(
        lines, f"Largest shares among the top {level(1 - sparsity)} of both, and overlap of these masks."
    )


def _opposed(result: ConflictResult) -> Html:
    verdicts = result.extra["verdicts"].to_dict("records")
    lines = [
        (
            f"{row['task_a']} and {row['task_b']}",
            join([badge(row["verdict"], slight=row["slight"]), tag("small", _how_much(row))]),
        )
        for row in verdicts
    ]
    pairs = result.top(1).to_dict("records")
    if not pairs or not pairs[0]["found"]:
        return _listed(lines)
    pair = pairs[0]
    text = join([
        "Most certain: ", _strong(pair["sample_a"]), " and ", _strong(pair["sample_b"]),
        f" (cosine {signed(pair['cosine'])}; {signed(pair['slice_cosine'])} at {slice_name(pair)})",
    ])  # fmt: skip
    texts = [sample_text(pair[key]) for key in ("text_a", "text_b") if isinstance(pair.get(key), str)]
    return join([_listed(lines), tag("p", text), *texts])


def _how_much(verdict: dict[Any, Any]) -> str:
    """What was found, by number; where nothing was, the reason."""
    words = {
        "pairs": ("pair", "{} of samples"),
        "heads": ("pair", "{} on a head"),
        "samples": ("sample", "{} against the other task"),
        "blocks": ("head slice", "the tasks as a whole on {}"),
    }
    counts = [
        text.format(counted(int(verdict[key]), noun)) for key, (noun, text) in words.items() if verdict[key]
    ]
    return f"{', '.join(counts)}." if counts else str(verdict["reason"])


def _stress(result: InterferenceResult) -> Html:
    column = result.telling
    lines = []
    for (a, b), rows in result.frame.groupby(["task_a", "task_b"], sort=False):
        if rows[column].notna().any():
            best = rows.sort_values(column, ascending=False, kind="stable").iloc[0]
            place = join([_strong(slice_name(best)), f" (score {short(best[column])})"])
            lines.append((f"{a} on {b}", place))
    which = "Mean score" if column == "mean" else "Score that 5% of the first task's samples exceed"
    return _listed(lines, f"{which} on a head slice. Compare slices, not pairs of tasks.")


def _listed(lines: list[tuple[str, Html]], note: str = "") -> Html:
    """The first lines, each under its name, and how many there are beside them."""
    if not lines:
        return Html("")
    more = f"And {len(lines) - _MOST} more below. " if len(lines) > _MOST else ""
    shown = join(join([tag("dt", name), tag("dd", text)]) for name, text in lines[:_MOST])
    remark = tag("p", more + note, class_="note") if more or note else Html("")
    return join([tag("dl", shown), remark])
