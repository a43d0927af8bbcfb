"""The sections of the page."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from fisherscope.analyses import Failed, Outcome, Result, Skipped
from fisherscope.report.facts import Facts
from fisherscope.report.figures import Figure, figures_of
from fisherscope.report.headline import headline
from fisherscope.report.markup import Html, grid, join, tag
from fisherscope.report.numbers import percent, short, size
from fisherscope.report.plots import Plots
from fisherscope.report.tables import tables_of
from fisherscope.report.verdicts import verdicts
from fisherscope.words import counted

logger = logging.getLogger(__name__)

_LINES = 7

TITLES = {
    "fisher": "Fisher information",
    "importance": "Importance",
    "masks": "Masks",
    "overlap": "Overlap of tasks",
    "conflict": "Conflicting samples",
    "interference": "Interference",
}


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        key: its anchor.
        title: heading, also in the table of contents.
        body: the rest.
        status: "", "skipped" or "failed".
    """

    key: str
    title: str
    body: Html
    status: str = ""


def title_of(name: str) -> str:
    """Heading of an analysis."""
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def summary_section(outcomes: Mapping[str, Outcome]) -> Section:
    """The findings, and what went wrong."""
    results = {name: o for name, o in outcomes.items() if isinstance(o, Result)}
    cards = [
        tag(
            "article",
            tag("h3", tag("a", card.title, href=f"#{anchor(card.section)}")),
            card.body,
            class_="card",
        )
        for card in headline(results)
    ]
    trouble = [
        tag("p", tag("b", f"{title_of(name)} {_status(o)}. "), _reason(o), class_=f"box {_status(o)}")
        for name, o in outcomes.items()
        if not isinstance(o, Result)
    ]
    return Section("summary", "Summary", join([*trouble, tag("div", *cards, class_="cards")]))


def run_section(facts: Facts) -> Section:
    """Where the numbers come from."""
    made = facts.provenance
    heads = _heads(facts.heads, "head")
    if facts.grouped_query:
        heads += f", {_heads(facts.kv_heads, 'kv head')}"
    name = made.get("model_class") or facts.model_type
    packages = [f"{k} {made[k]}" for k in ("fisherscope", "torch", "transformers", "python") if k in made]
    rows: list[tuple[str, object]] = [
        ("model", facts.model),
        ("architecture", f"{name}: {counted(facts.layers, 'attention layer')}, {heads}"),
        ("parameters", short(int(facts.coverage["weights"].sum()))),
        ("dtype and device", f"{made.get('model_dtype', 'unknown')} on {made.get('device', 'unknown')}"),
        ("store", tag("code", facts.store_path.name)),
        ("size of the store", size(facts.store_bytes)),
        ("gradients stored", facts.gradients),
        ("Fisher information", f"{facts.fisher_shape}, normalization {facts.normalization}"),
        ("fingerprint of the run", tag("code", facts.fingerprint)),
        ("versions", ", ".join(packages)),
    ]
    table = grid(
        ["task", "samples", "loss-bearing tokens", "nats per token", "truncated samples", "tokens cut off"],
        [
            (
                row["task"],
                short(row["samples"]) + ("" if row["complete"] else f" of {row['expected']:,}, incomplete"),
                short(row["tokens"]),
                short(row["loss"]),
                short(row["truncated"]),
                short(row["tokens_lost"]),
            )
            for row in facts.tasks.to_dict("records")
        ],
        [False, True, True, True, True, True],
        "Tasks",
    )
    facts_list = tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in rows if value))
    return Section("run", "The run", join([facts_list, table, *_proofs(facts)]))


def _proofs(facts: Facts) -> list[str]:
    """How the gradients of each task were compared with autograd's, and what that cannot show."""
    if not facts.proofs:
        return []
    rows = [tag("li", tag("b", task), ": ", found["in_words"]) for task, found in facts.proofs.items()]
    note = tag("p", next(iter(facts.proofs.values()))["cannot_see"], class_="note")
    return [tag("h3", "Proofs of the gradients"), tag("ul", *rows), note]


def coverage_section(facts: Facts) -> Section:
    """What of the model was instrumented."""
    cover = facts.coverage
    total, done = int(cover["weights"].sum()), int(cover["weights_instrumented"].sum())
    words = tag(
        "p",
        tag("b", percent(facts.share_instrumented)),
        f" of the model's {counted(total, 'weight')} are instrumented ({done:,}); sample gradients are "
        f"stored of {int(cover['weights_with_gradients'].sum()):,}.",
    )
    table = grid(
        ["kind", "parameters", "instrumented", "weights", "instrumented", "share", "with sample gradients"],
        [
            (
                row["kind"],
                short(row["parameters"]),
                short(row["instrumented"]),
                short(row["weights"]),
                short(row["weights_instrumented"]),
                percent(row["weights_instrumented"] / row["weights"]),
                short(row["weights_with_gradients"]),
            )
            for row in cover.to_dict("records")
        ],
        [False, *[True] * 6],
        "By kind of parameter",
    )
    rest = Html("")
    if facts.left_out:
        rest = tag(
            "details",
            tag("summary", f"{counted(len(facts.left_out), 'parameter')} not covered"),
            tag("pre", "\n".join(facts.left_out), class_="list"),
        )
    return Section("coverage", "Coverage", join([words, *_shared(facts), table, rest]))


def _shared(facts: Facts) -> list[Html]:
    """What serves several layers, and what that does to its gradients."""
    if not facts.shared:
        return []
    some = [tag("li", tag("code", module), f" runs {runs:,} times") for module, runs in facts.shared]
    note = tag(
        "p",
        "Modules that run several times in a forward pass. A sample's gradient of their weights is the sum "
        "over these runs, so each is shown once.",
    )
    listed = tag("ul", *some[:_LINES])
    if len(some) > _LINES:
        more = tag("summary", counted(len(some) - _LINES, "more module"))
        listed = join([listed, tag("details", more, tag("ul", *some[_LINES:]))])
    return [note, listed]


def analysis_section(name: str, outcome: Outcome, files: Mapping[str, str], plots: Plots) -> Section:
    """One analysis: verdicts, words, warnings, figures, tables; or why there is none."""
    key = anchor(name)
    if isinstance(outcome, Skipped):
        body = tag("div", tag("p", tag("b", "Skipped. "), outcome.reason), class_="box skipped")
        return Section(key, title_of(name), body, "skipped")
    if isinstance(outcome, Failed):
        trace = tag("details", tag("summary", "Traceback"), tag("pre", outcome.traceback, class_="trace"))
        body = tag(
            "div", tag("p", tag("b", "Failed. "), tag("code", outcome.error)), trace, class_="box failed"
        )
        return Section(key, title_of(name), body, "failed")
    notes = [tag("p", tag("b", "Note. "), note, class_="box warning") for note in outcome.warnings]
    tables = tables_of(outcome)
    folded = Html("")
    if tables.folded:
        what = counted(len(tables.folded), "table")
        folded = tag("details", tag("summary", what), *tables.folded, class_="fold")
    csv = join((tag("code", f"tables/{file}") for file in files.values()), ", ")
    source = tag("p", "All rows: ", csv, ".", class_="note") if files else Html("")
    told, words = verdicts(outcome), _words(outcome)
    if told:  # they have given the reasons already
        words = tag("details", tag("summary", "In sentences, with means and variances"), words, class_="fold")
    parts = [told, words, *notes, _figures(outcome, plots), *tables.shown, folded, source]
    return Section(key, title_of(name), join(parts))


def _words(result: Result) -> Html:
    """The summary, one item per sentence or pair of tasks; a long one opens."""
    lines = [tag("li", line) for line in result.summary().splitlines()]
    rest = Html("")
    if len(lines) > _LINES + 2:
        title = tag("summary", f"{counted(len(lines) - _LINES, 'more sentence')}")
        rest = tag("details", title, tag("ul", *lines[_LINES:]))
        lines = lines[:_LINES]
    return tag("div", tag("ul", *lines), rest, class_="words")


def anchor(name: str) -> str:
    """Anchor of an analysis, apart from those of the page's own sections."""
    return "analysis-" + "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)


def _figures(result: Result, plots: Plots) -> Html:
    try:
        figures = figures_of(result)
    except Exception as error:
        # the numbers are there all the same: say what is missing and go on to the tables
        logger.exception("figures of %s", result.name)
        reason = f"{type(error).__name__}: {error}"
        return tag("p", tag("b", "The figures could not be made. "), tag("code", reason), class_="box failed")
    return (
        tag("div", *(_figure(figure, plots) for figure in figures), class_="figures") if figures else Html("")
    )


def _figure(figure: Figure, plots: Plots) -> Html:
    place = plots.add(figure)
    caption = tag("figcaption", figure.caption) if figure.caption else Html("")
    return tag("figure", tag("h3", figure.title), place, caption, class_="wide" if figure.wide else None)


def _status(outcome: Outcome) -> str:
    return "failed" if isinstance(outcome, Failed) else "skipped"


def _reason(outcome: Outcome) -> str:
    return outcome.error if isinstance(outcome, Failed) else getattr(outcome, "reason", "")


def _heads(numbers: tuple[int, ...], noun: str) -> str:
    """``1 head``, ``8 or 16 heads``, ``no heads``."""
    return f"{' or '.join(map(str, numbers)) or 'no'} {noun}{'' if numbers == (1,) else 's'}"
