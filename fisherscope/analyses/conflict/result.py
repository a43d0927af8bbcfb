"""The result of the conflict analysis."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import xarray as xr
from typing_extensions import override

from fisherscope.analyses.result import Result
from fisherscope.analyses.units import slice_name

NO_CLAIM = (
    "These are plain cosines without a test: no significance is claimed, and among so many pairs some are "
    "this low by chance."
)


@dataclass(kw_only=True, eq=False, repr=False)
class ConflictResult(Result):
    """Natural-gradient cosines across tasks.

    ``frame``: the most opposed pairs of samples of each pair of tasks: task_a, task_b, sample_a,
    sample_b, ``cosine`` over all attention weights, ``reference`` (mean cosine of samples of one task),
    ``excess`` = cosine - reference, ``effect_size`` (d = sqrt((1 - cosine) / 2); 0.71 for unrelated
    gradients), the slice where the pair is most opposed (``stack``, ``layer``, ``block``, ``head``,
    ``slice_cosine``), and text_a, text_b where stored. ``extra["levels"]``: mean, min, share_negative,
    reference, excess and undefined (share of pairs without a cosine) per slice, block, layer and over the
    whole. ``data``: mean, min, share_negative, reference, excess of the slices with axes (task_a, task_b,
    layer, block, head), the same for both orders; and the whole-model cosines of each pair of tasks where
    they are few enough (see :meth:`cosines`).
    """

    def cosines(self, task_a: str, task_b: str) -> xr.DataArray:
        """Whole-model cosines of every pair of samples, axes (sample_a, sample_b) with the sample ids.

        Raises:
            KeyError: no such pair of tasks, or its matrix was too large to keep.
        """
        tasks = list(self.details["samples"])
        if self.data is not None and {task_a, task_b} <= set(tasks):
            i, j = tasks.index(task_a), tasks.index(task_b)
            if (name := matrix_name(min(i, j), max(i, j))) in self.data:
                found = self.data[name].drop_vars("stack", errors="ignore")
                found = found.transpose(sample_axis(i), sample_axis(j))
                return found.rename({sample_axis(i): "sample_a", sample_axis(j): "sample_b"})
        limit = self.config["matrix_limit"]
        raise KeyError(
            f"no cosines of {task_a!r} and {task_b!r}: they are kept for compared tasks with at most {limit} "
            "pairs of samples (ConflictConfig.matrix_limit)"
        )

    @override
    def top(self, k: int = 10) -> pd.DataFrame:
        """The most opposed pairs of samples."""
        return self.frame.head(k).reset_index(drop=True)

    @override
    def summary(self) -> str:
        lines = []
        levels = self.extra["levels"]
        for (a, b), rows in levels.groupby(["task_a", "task_b"], sort=False):
            whole = rows[rows["level"] == "whole"].iloc[0]
            line = f"{a} and {b}: mean natural-gradient cosine {whole['mean']:+.3f}"
            if whole["reference"] == whole["reference"]:
                line += f" (samples of one task: {whole['reference']:+.3f})"
            line += f", {whole['share_negative']:.0%} of the pairs below 0."
            slices = rows[(rows["level"] == "slice") & rows["mean"].notna()]
            if len(slices):
                worst = slices.sort_values("mean", kind="stable").iloc[0]
                line += f" Lowest on average at {slice_name(worst)} ({worst['mean']:+.3f})."
            pairs = self.frame[(self.frame["task_a"] == a) & (self.frame["task_b"] == b)]
            if len(pairs):
                pair = pairs.iloc[0]
                line += (
                    f" Most opposed pair: {pair['sample_a']} and {pair['sample_b']} ({pair['cosine']:+.3f}; "
                    f"{pair['slice_cosine']:+.2f} at {slice_name(pair)})."
                )
            lines.append(line)
        return "\n".join([*lines, NO_CLAIM])


def matrix_name(first: int, second: int) -> str:
    """Variable with the cosines of two tasks, by their numbers; names of tasks may not fit a file format."""
    return f"cosine_{first}_{second}"


def sample_axis(task: int) -> str:
    """Axis of the samples of a task, by its number."""
    return f"sample_{task}"
