"""The outcomes of a run of analyses as one object."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from fisherscope.analyses import (
    AnalyzeConfig,
    ContributionStore,
    Failed,
    Outcome,
    Result,
    Skipped,
    as_store,
    run,
)
from fisherscope.report.facts import Facts, facts_of
from fisherscope.report.saving import save
from fisherscope.telling import steps
from fisherscope.torch_state import in_standard_state

logger = logging.getLogger(__name__)


@in_standard_state
def analyze(
    store_or_path: ContributionStore | str | Path,
    analyses: Iterable[str] | None = None,
    config: AnalyzeConfig | None = None,
    *,
    quiet: bool = False,
) -> Report:
    """Run analyses on a store, without the model.

    An analysis that fails does not stop the others, and one whose data was not collected is skipped: see
    :attr:`Report.failed` and :attr:`Report.skipped`.

    Args:
        store_or_path: an open store, or its directory.
        analyses: names in the order they run; None runs all that are registered.
        config: options of all analyses; the defaults where None.
        quiet: no progress.

    Returns:
        A :class:`Report`: ``report["interference"].top(10)``, ``report.save("report/")``.

    Raises:
        StoreFormatError: the path is no store, or one of another format version.
        CorruptStoreError: the store is damaged.
        ValueError: no such analysis or task.
    """
    store = as_store(store_or_path)
    chosen = config or AnalyzeConfig()
    outcomes = run(store, analyses, chosen, quiet=quiet)
    usable = {name: _usable(name, outcome) for name, outcome in outcomes.items()}
    return Report(usable, facts_of(store, chosen.tasks), chosen, quiet=quiet)


def _usable(name: str, outcome: Outcome) -> Outcome:
    """The outcome; a failure where a result cannot say what it found, as every page and file needs it to."""
    if isinstance(outcome, Result):
        try:
            json.dumps(outcome.to_json(max_rows=1), allow_nan=False)
            outcome.top(1)
            outcome.files()
        except Exception as error:
            logger.exception("the result of analysis %r cannot be shown", name)
            return Failed.of(name, error)
    return outcome


class Report(Mapping[str, Result]):
    """Results by name of the analysis, in the order they ran.

    Iteration, ``len`` and ``in`` speak of the analyses that have a result.

    Attributes:
        outcomes: name -> what came of each analysis: its result, or ``Skipped``, or ``Failed``.
        facts: what the report says about the run behind the store.
        config: the options of the analyses.
        quiet: whether saving shows no progress.
    """

    def __init__(
        self, outcomes: Mapping[str, Outcome], facts: Facts, config: AnalyzeConfig, *, quiet: bool = True
    ) -> None:
        """Use :func:`analyze`."""
        self.quiet = quiet
        self.outcomes: dict[str, Outcome] = dict(outcomes)
        self.facts = facts
        self.config = config

    @override
    def __getitem__(self, name: str) -> Any:
        """The result of an analysis: a :class:`~fisherscope.analyses.Result` of its own class.

        Raises:
            KeyError: it was skipped, failed, or did not run; the message says why.
        """
        outcome = self.outcomes.get(name)
        if isinstance(outcome, Result):
            return outcome
        if outcome is not None:
            raise KeyError(str(outcome))
        raise KeyError(f"analysis {name!r} was not run: there are {', '.join(self.outcomes) or 'none'}")

    @override
    def __iter__(self) -> Iterator[str]:
        return (name for name, outcome in self.outcomes.items() if isinstance(outcome, Result))

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def failed(self) -> dict[str, str]:
        """Name -> error of the analyses that failed."""
        return {name: o.error for name, o in self.outcomes.items() if isinstance(o, Failed)}

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> reason, with what to collect, of the analyses that were skipped."""
        return {name: o.reason for name, o in self.outcomes.items() if isinstance(o, Skipped)}

    @property
    def store_path(self) -> Path:
        """The store that was analyzed."""
        return self.facts.store_path

    def summary(self) -> str:
        """What was found, in words: one paragraph per analysis."""
        return "\n\n".join(f"{name}\n{_words(outcome)}" for name, outcome in self.outcomes.items())

    @in_standard_state
    def save(self, path: str | Path, *, quiet: bool | None = None) -> Path:
        """Write ``report.html``, ``results.json`` and ``tables/``: CSV, and what else a result has.

        All files are written before the first one takes its place, so that an error leaves an earlier report
        as it was. Saving again replaces the files of an earlier report, and touches no others.

        In the CSV files an apostrophe stands before texts that a spreadsheet would take for formulas;
        :func:`fisherscope.report.read_table` reads them without.

        Args:
            path: a directory, made where it does not exist; or a file whose name ends with ``.html``, which
                receives the page alone.
            quiet: no progress; as it was for :func:`analyze` where None.

        Returns:
            The path.

        Raises:
            NotADirectoryError: the path is a file, and no page.
            IsADirectoryError: it ends with ``.html`` and is a directory.
            OSError: a file cannot be written.
        """
        target = Path(path)
        with (
            steps("report", quiet=self.quiet if quiet is None else quiet) as told,
            told.step(f"into {target}"),
        ):
            return save(self, target, told.detail)

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {_state(outcome)}" for name, outcome in self.outcomes.items())
        return f"<Report on {str(self.store_path)!r}: {states}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_state(outcome)}</td>"
            f"<td style='text-align:left'>{html.escape(_words(outcome).partition(chr(10))[0])}</td></tr>"
            for name, outcome in self.outcomes.items()
        )
        return (
            f"<p><b>Report</b> on <code>{html.escape(str(self.store_path))}</code></p>"
            f"<table><tr><th>analysis</th><th>status</th><th>in words</th></tr>{rows}</table>"
        )


def _state(outcome: Outcome) -> str:
    if isinstance(outcome, Result):
        return "ok"
    return "failed" if isinstance(outcome, Failed) else "skipped"


def _words(outcome: Outcome) -> str:
    if isinstance(outcome, Result):
        return outcome.summary()
    return f"failed: {outcome.error}" if isinstance(outcome, Failed) else f"skipped: {outcome.reason}"
