"""What an analysis is given beside the store and its options."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import combinations

import numpy as np

from fisherscope.analyses.config import AnalyzeConfig
from fisherscope.analyses.outcome import Failed, Outcome, SkipAnalysis, Skipped
from fisherscope.analyses.result import Result
from fisherscope.errors import FisherscopeError, UsageError
from fisherscope.store import ContributionStore
from fisherscope.words import counted


def _to_nobody(text: str) -> None:
    """Progress that nobody wants to see."""


class Context:
    """Tasks, randomness and memory of one run, and the results of other analyses.

    Attributes:
        settings: options of the whole run.
        tasks: the tasks to analyse, in order.
        empty: chosen tasks of which no sample is in the store yet; they are left out.
        memory_budget: bytes of stored data to hold at a time.
        tell: says how far an analysis is, such as ``pair 2 of 6``, where progress is shown.
    """

    def __init__(
        self,
        store: ContributionStore,
        settings: AnalyzeConfig,
        outcome: Callable[[str], Outcome] | None = None,
        tell: Callable[[str], None] = _to_nobody,
    ) -> None:
        """Make the context of a run; ``outcome`` runs another analysis, once.

        Raises:
            ValueError: a chosen task is not in the store.
        """
        known = list(store.tasks)
        if unknown := [task for task in settings.tasks or () if task not in known]:
            raise UsageError(f"the store has no task {unknown[0]!r}: it has {', '.join(known)}")
        self.settings = settings
        chosen = settings.tasks or tuple(known)
        self.empty = tuple(task for task in chosen if not store.committed(task))
        self.tasks: tuple[str, ...] = tuple(task for task in chosen if task not in self.empty)
        self.memory_budget = settings.memory_budget
        self._outcome = outcome
        self.tell = tell

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each unordered pair of tasks once, in task order."""
        return list(combinations(self.tasks, 2))

    def rng(self, *labels: str) -> np.random.Generator:
        """A generator of its own for these labels: adding a task or an analysis changes no other's draws."""
        return np.random.default_rng([self.settings.seed, *(zlib.crc32(label.encode()) for label in labels)])

    def result(self, name: str) -> Result:
        """The result of another analysis, run now unless it already was.

        Raises:
            SkipAnalysis: it was skipped.
            FisherscopeError: it failed.
        """
        if self._outcome is None:
            raise SkipAnalysis(f"needs the result of {name!r}: run both through fisherscope.analyses.run")
        outcome = self._outcome(name)
        if isinstance(outcome, Skipped):
            raise SkipAnalysis(f"it builds on {name!r}, which was skipped: {outcome.reason}")
        if isinstance(outcome, Failed):
            raise FisherscopeError(f"it builds on {name!r}, which failed: {outcome.error}")
        return outcome


def encoding_warnings(store: ContributionStore, context: Context) -> list[str]:
    """A note where stored gradients are approximations: how good they are, in all samples and parameters."""
    if "lowrank" not in store.header.gradient_encodings.values():
        return []
    found = [store.encoding_errors(task).to_numpy().ravel() for task in context.tasks]
    errors = np.concatenate(found) if found else np.empty(0)
    errors = errors[~np.isnan(errors)]
    if not len(errors):
        return []
    median, worst = float(np.median(errors)), float(errors.max())
    return [f"stored gradients are low rank: relative error median {median:.2g}, worst {worst:.2g}"]


def task_warnings(store: ContributionStore, context: Context) -> list[str]:
    """Notes on tasks whose numbers need care: no sample, a single one, or samples still missing."""
    notes = [f"task {task!r} has no samples in the store and is left out" for task in context.empty]
    for task in context.tasks:
        rows = store.committed(task)
        if rows == 1:
            notes.append(
                f"task {task!r} has a single sample: variance and intervals are undefined, and F is that "
                "sample's own square"
            )
        if not store.is_complete(task):
            notes.append(
                f"task {task!r} is not completely collected ({rows} of {counted(store.n(task), 'sample')})"
            )
        if (covered := store.fisher_count(task)) != rows:
            notes.append(
                f"aggregates of task {task!r} (F of single parameters, means) are those of {covered} of its "
                f"{counted(rows, 'sample')}: resume the run to complete them"
            )
    return notes
