"""Tables of conflict: pairs with their texts, findings in words, clusters, and what to do about them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from fisherscope.analyses.conflict import ConflictResult
from fisherscope.analyses.units import slice_name
from fisherscope.report.cells import WHERE, Tables, table
from fisherscope.report.markup import Html, join, sample_text, tag
from fisherscope.report.numbers import p_value, signed
from fisherscope.report.tokens import marked_text
from fisherscope.words import counted

_ADVICE = {
    "filter": "Samples to drop",
    "reweight": "Samples to weigh less",
    "curriculum": "An order to train in, without conflict and easy first",
    "augment": "Samples to keep and support with more of their kind",
}
_CAUTION = (
    "What to do about it: four alternatives, rules of thumb on top of the findings. Only training tells "
    "whether one helps."
)
_MEMBERS = 3


def conflict_tables(result: ConflictResult, rows: int) -> Tables:
    """Found pairs, findings on heads, and clusters; what was not found, places and recommendations folded."""
    shown: list[Html] = []
    folded: list[Html] = []
    for (a, b), part in result.frame.groupby(["task_a", "task_b"], sort=False):
        place = shown if part["found"].any() else folded
        place.append(_pairs(part, str(a), str(b), result.extra["positions"], rows))
    shown += _findings(result, rows)
    clusters = result.extra["clusters"]
    clusters = clusters[clusters["pairs"] > 1]
    if len(clusters):
        shown.append(_clusters(clusters, rows))
    folded += [*_samples(result, rows), *_places(result, rows), *_modules(result, rows)]
    return Tables(shown, [*folded, *_advice(result, rows)])


def _pairs(pairs: pd.DataFrame, a: str, b: str, positions: pd.DataFrame, rows: int) -> Html:
    """The pairs that were found first, else the most opposed ones."""
    best = pairs.sort_values("found", ascending=False, kind="stable").head(rows)
    number = int(pairs["found"].sum())
    title = f"{counted(number, 'pair')} of samples in conflict"
    title = title if number else "the most opposed pairs of samples, none of them found to conflict"
    cells = {f"sample of {task}": _texts(best, side, positions) for side, task in (("a", a), ("b", b))}
    records = best.to_dict("records")
    interval = "cosine, 95% interval" if best["cosine_low"].notna().any() else "cosine"
    cells[interval] = list(map(_cosine, records))
    cells["most at"] = list(map(_where, records))
    columns = [*list(cells)[:3], "excess", "effect_size", "q", "most at"]
    if any("<mark" in cell for side in list(cells.values())[:2] for cell in side):
        title += ". Marked tokens carry the conflict, the darker the more"
    return table(best, f"{a} and {b}: {title}", columns, cells)


def _cosine(row: dict[Any, Any]) -> Html:
    cosine = tag("b" if row["found"] else "span", signed(row["cosine"]))
    if row["cosine_low"] != row["cosine_low"]:
        return cosine
    return join([cosine, tag("small", f"{signed(row['cosine_low'])} to {signed(row['cosine_high'])}")])


def _where(row: dict[Any, Any]) -> Html:
    called = "" if row["slice_q"] != row["slice_q"] else f", q {p_value(row['slice_q'])}"
    return join([slice_name(row), tag("small", f"cosine {signed(row['slice_cosine'])}{called}")])


def _texts(pairs: pd.DataFrame, side: str, positions: pd.DataFrame) -> list[Html]:
    """Ids of one side, each with its text, and the tokens that carry the conflict where they are known."""
    cells = []
    for row in pairs.to_dict("records"):
        name, text = row[f"sample_{side}"], row.get(f"text_{side}")
        marked = _marked(row, side, positions)
        plain = (
            sample_text(text) if isinstance(text, str) and not marked.startswith(("<pre", "<details")) else ""
        )
        cells.append(join([tag("span", name, class_="id"), plain, marked]))
    return cells


def _marked(row: dict[Any, Any], side: str, positions: pd.DataFrame) -> Html:
    if positions.empty:
        return Html("")
    mine = positions["side"] == side
    for column in ("task_a", "task_b", "sample_a", "sample_b"):
        mine &= positions[column] == row[column]
    return marked_text(positions[mine])


def _findings(result: ConflictResult, rows: int) -> list[Html]:
    """Findings on single heads, in sentences."""
    sentences = result.findings
    if not sentences:
        return []
    lines = [tag("li", sentence) for sentence in sentences[: 5 * rows]]
    words = tag("ul", *lines[:rows])
    if len(lines) > rows:
        rest = tag("details", tag("summary", f"{len(lines) - rows} more"), tag("ul", *lines[rows:]))
        words = join([words, rest])
    title = "Findings on head slices"
    spots = result.extra["hot_spots"]
    # of very many the result lists the most certain ones, and counts them all
    number = int(spots.loc[spots["level"] == "slice", "pairs"].sum())
    if number > len(lines):
        title += f": the {len(lines)} most certain of {number:,}"
    return [tag("div", tag("h3", title), words, class_="words findings")]


def _clusters(clusters: pd.DataFrame, rows: int) -> Html:
    best = clusters.sort_values("pairs", ascending=False, kind="stable").head(rows)
    members = {"members": [_members(row) for row in best.to_dict("records")]}
    columns = ["task_a", "task_b", "samples_a", "samples_b", "pairs", "density", "mean_cosine", *members]
    return table(best, "Clusters of samples that conflict with each other", columns, members)


def _members(row: dict[Any, Any]) -> Html:
    """The members of both sides; some of them show before it is opened."""
    sides = [row["members_a"].split("; "), row["members_b"].split("; ")]
    some = "; ".join(" ".join(names[:_MEMBERS]) for names in sides)
    if all(len(names) <= _MEMBERS for names in sides):
        return tag("span", some)
    title = tag("summary", tag("span", some, " \N{HORIZONTAL ELLIPSIS}", class_="clip"))
    return tag(
        "details",
        title,
        tag("pre", row["members_a"], "\n\n", row["members_b"], class_="sample"),
        class_="sample",
    )


def _samples(result: ConflictResult, rows: int) -> list[Html]:
    """Samples that were held against another task as a whole."""
    samples = result.extra["samples"]
    columns = ["sample", "against", "mean_cosine", "own_cosine", "q", "degree"]
    tables = []
    for direction, words in (
        (-1, "oppose another task as a whole"),
        (1, "agree with another task as a whole"),
    ):
        called = samples[samples["direction"] == direction]
        called = called.sort_values("mean_cosine", ascending=direction < 0, kind="stable")
        if len(called):
            tables.append(table(called.head(rows), f"Samples that {words}: {len(called):,}", columns))
    return tables


def _places(result: ConflictResult, rows: int) -> list[Html]:
    spots = result.extra["hot_spots"]
    slices = spots[spots["level"] == "slice"].sort_values("pairs", ascending=False, kind="stable")
    columns = ["task_a", "task_b", WHERE, "pairs", "share", "mean", "q"]
    return [table(slices.head(rows), "Head slices where most pairs conflict", columns)] if len(slices) else []


def _modules(result: ConflictResult, rows: int) -> list[Html]:
    """Whole parameters and MLPs, where their gradients are stored."""
    modules = result.extra["modules"]
    opposed = modules[modules["mean"].notna()].sort_values("mean", kind="stable").head(rows)
    columns = ["task_a", "task_b", "parameter", "kind", "mean", "excess", "q", "share_a", "share_b"]
    return [table(opposed, "Parameters with the lowest mean cosine", columns)] if len(opposed) else []


def _advice(result: ConflictResult, rows: int) -> list[Html]:
    """The first rows of each recommendation; nothing where nothing was found."""
    if (result.extra["reweight"]["weight"] == 1).all() and result.extra["filter"].empty:
        return []
    parts = []
    for key, title in _ADVICE.items():
        frame = result.extra[key]
        if key == "reweight":
            frame = frame[frame["weight"] < 1].sort_values("weight", kind="stable")
        if len(frame):
            parts.append(table(frame.head(rows), f"{title}: {len(frame):,}"))
    note = tag("p", _CAUTION, _most_of_a_task(result), class_="note")
    return [join([note, parts[0]]), *parts[1:]]


def _most_of_a_task(result: ConflictResult) -> str:
    """What to think of a list that leaves little of a task."""
    dropped = result.extra["filter"]["task"].value_counts()
    samples = result.extra["reweight"]["task"].value_counts()
    emptied = [str(task) for task, count in samples.items() if dropped.get(task, 0) > count / 2]
    if not emptied:
        return ""
    return (
        f" Dropping would take more than half of {', '.join(emptied)}: there the tasks conflict, not some "
        "samples, and a list of samples is no answer."
    )
