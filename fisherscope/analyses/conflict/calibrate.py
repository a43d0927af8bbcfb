"""Trying the conflict tests on a store where nothing is to be found: random halves of its own tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from typing_extensions import override

from fisherscope.analyses.config import AnalyzeConfig, ConflictConfig
from fisherscope.analyses.conflict.calibration import COLUMNS, HISTOGRAM, Calibration
from fisherscope.analyses.conflict.cosines import Blocks
from fisherscope.analyses.conflict.grams import GramStream
from fisherscope.analyses.conflict.levels import own_margin
from fisherscope.analyses.conflict.windows import Windows
from fisherscope.analyses.context import Context
from fisherscope.analyses.quantities import missing
from fisherscope.analyses.result import Result
from fisherscope.analyses.slices import SliceReader
from fisherscope.errors import NotStoredError, UsageError
from fisherscope.store import ContributionStore, as_store
from fisherscope.telling import steps
from fisherscope.torch_state import in_standard_state
from fisherscope.words import counted


@dataclass(kw_only=True, eq=False, repr=False)
class CalibrationResult(Result):
    """The conflict tests on random halves of single tasks.

    ``frame``: task, test ("pairs", "heads", "blocks"), splits, rejecting (splits in which the test called
    anything), upper (95 % bound of their share), chance (of so many if the test keeps its level), calibrated
    (None where it was not tried), samples (on a side).
    ``extra["p"]``: the p-values of all splits in bins: task, test, low, high, count.
    """

    @property
    def calibrated(self) -> bool:
        """Whether no test calls too much."""
        return not self.frame["calibrated"].eq(False).any()

    @override
    def top(self, k: int = 10) -> pd.DataFrame:
        """The rows that are least likely if the tests keep their level."""
        return self.frame.sort_values("chance", kind="stable").head(k).reset_index(drop=True)

    @override
    def summary(self) -> str:
        lines = []
        for row in self.frame.to_dict("records"):
            name = f"{row['task']}, {row['test']}"
            if not row["splits"]:
                lines.append(f"{name}: not tried, too few samples (8 are needed).")
                continue
            told = (
                f"{name}: something was called in {row['rejecting']} of {counted(row['splits'], 'split')} "
                f"({counted(row['samples'], 'sample')} a side)"
            )
            if row["calibrated"]:
                lines.append(f"{told}: in at most {row['upper']:.0%} of them, with 95 % confidence.")
            else:
                lines.append(
                    f"{told}; the probability of so many is {row['chance']:.2g} if q-values hold what they "
                    "promise: they cannot be trusted here."
                )
        return "\n".join([*lines, _LIMITS])


_LIMITS = (
    "Splits of one task share samples, so that they are not independent, and a side has at most half of "
    "them: that nothing was called is no proof for the tasks as a whole."
)


@in_standard_state
def calibrate(
    store: ContributionStore | str | Path,
    config: AnalyzeConfig | None = None,
    *,
    splits: int = 200,
    quiet: bool = False,
) -> CalibrationResult:
    """Try the conflict tests on random halves of each task, where nothing is to be found.

    Each task by itself, with its own F, in the metric of ``config.conflict``: what was called there are
    errors. Results of ``conflict`` rest on a short form of this, with splits of both tasks in their common F.

    Args:
        store: an open store, or its directory.
        config: tasks, seed, memory_budget and ``conflict``.
        splits: per task.
        quiet: no progress.

    Returns:
        A :class:`CalibrationResult`; a test whose ``calibrated`` is False calls too much on this store.

    Raises:
        NotStoredError: the store holds no sample gradients of attention weights.
        ValueError: no such task, or fewer than one split.
        StoreFormatError: the path is no store.
    """
    if splits < 1:
        raise UsageError(f"splits is {splits}: at least 1 is needed")
    opened = as_store(store)
    settings = config or AnalyzeConfig()
    context = Context(opened, settings)
    if (reason := missing(opened, ("gradients",))) is not None:
        raise NotStoredError(reason)
    reader = SliceReader(opened, context.memory_budget, context.tasks)
    frames: list[pd.DataFrame] = []
    histograms: list[pd.DataFrame] = []
    with steps("calibrate", len(context.tasks), quiet=quiet) as told:
        for task in context.tasks:
            with told.step(task):
                found = _split(reader, task, settings.conflict, splits, context.rng("calibrate", task))
            for tables, table in ((frames, found.frame()), (histograms, found.histogram())):
                table.insert(0, "task", task)
                tables.append(table)
    return CalibrationResult(
        name="calibrate",
        config={**asdict(settings.conflict), "calibration_splits": splits},
        frame=_together(frames, ["task", *COLUMNS]),
        extra={"p": _together(histograms, ["task", *HISTOGRAM])},
    )


def _together(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _split(
    reader: SliceReader, task: str, config: ConflictConfig, splits: int, rng: np.random.Generator
) -> Calibration:
    """The tests on splits of one task."""
    windows = Windows(reader.usable(task, config.max_samples_per_task), config.contribution_averaging_window)
    found = Calibration.draw((len(windows),), splits, config.level, config.correction, rng)
    if found.halves:
        for place, gram in GramStream(reader, {task: windows}, config).attention():
            if place.level == "slice":
                # nothing stands beside the task: its own clusters make the margin
                own = own_margin(Blocks(gram, len(gram))) if config.margin is None else config.margin
                found.take_slice(gram, own)
            elif place.level == "whole":
                found.take_whole(gram)
    return found
