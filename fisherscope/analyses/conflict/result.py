"""The result of the conflict analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from typing_extensions import override

from fisherscope.analyses.conflict.recommendations import Recommendations
from fisherscope.analyses.result import Result
from fisherscope.analyses.units import slice_name


@dataclass(kw_only=True, eq=False, repr=False)
class ConflictResult(Result):
    """Which samples of two tasks are in conflict, where, and how sure that is.

    ``frame``: the pairs of samples that are found and the most opposed others, smallest p first: task_a,
    task_b, sample_a, sample_b; ``cosine`` over all attention weights, ``reference`` (mean cosine of samples
    of one task), ``excess`` = cosine - reference, ``effect_size`` (d = sqrt((1 - cosine) / 2); 0.71 for
    unrelated gradients); ``p`` and ``q`` of the pair test, ``found`` (q up to the level); the slice that
    carries the pair (``stack``, ``layer``, ``block``, ``head``, ``slice_cosine``; ``slice_q`` where the pair
    is called there, else it is the slice where it is most opposed); ``cosine_low`` and ``cosine_high`` (a
    bootstrap interval over positions, where they were looked into); text_a, text_b where stored.

    ``extra``:

    * "verdicts": per pair of tasks ``verdict`` ("found", "nothing found", "cannot tell"), whether all
      that was found is ``slight`` (means above -.05), ``reason``, how
      many pairs, pairs on heads, samples and blocks were found, and the ``detectable`` cosine.
    * "heads": pairs that conflict on a head slice, one row for each slice, with a sentence (``finding``) and
      texts.
    * "levels": per slice, block, layer and over the whole the numbers of
      :class:`~fisherscope.analyses.conflict.levels.Level` and q.
    * "modules": the same per parameter and MLP whose gradients are stored; and for every one that is
      instrumented ``share_a``, ``share_b`` of each task's F and, for an MLP, ``overlap`` of its channels.
    * "samples": each sample against another task as a whole: ``mean_cosine``, ``own_cosine`` (with its own
      task), p, q, ``direction`` (-1 where it is called to oppose that task, 1 where it agrees, else 0),
      ``degree`` (found pairs), ``loss`` (nats per token), ``gradient_norm``.
    * "calibration", "calibration_p": the tests tried on random halves of single tasks, and their p-values.
    * "clusters", "hot_spots", "filter", "reweight", "curriculum", "augment": see
      :func:`~fisherscope.analyses.conflict.communities.communities`,
      :func:`~fisherscope.analyses.conflict.hot_spots.hot_spots` and
      :class:`~fisherscope.analyses.conflict.recommendations.Recommendations`.
    * "positions": contributions of single positions to the cosines of a few pairs.

    ``data``: numbers of the slices with axes (task_a, task_b, layer, block, head), the same for both orders;
    and the whole-model cosines of each pair of tasks where they are few enough (see :meth:`cosines`).
    """

    @property
    def recommendations(self) -> Recommendations:
        """What to do about it: ids to drop, weights, an order, samples to support."""
        return Recommendations(**{name: self.extra[name] for name in Recommendations.__dataclass_fields__})

    @property
    def findings(self) -> list[str]:
        """A sentence for each pair and head slice that is in conflict, most certain first."""
        return self.extra["heads"].sort_values("p", kind="stable")["finding"].tolist()

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
        """The pairs of samples that are most surely in conflict."""
        order = np.lexsort([self.frame["cosine"], self.frame["p"]])
        return self.frame.iloc[order[:k]].reset_index(drop=True)

    @override
    def files(self) -> dict[str, str]:
        return {"weights.jsonl": self.recommendations.weights_jsonl()}

    @override
    def summary(self) -> str:
        lines = []
        for row in self.extra["verdicts"].to_dict("records"):
            a, b = row["task_a"], row["task_b"]
            lines.append(f"{a} and {b}: {row['verdict']}. {row['reason']}".strip())
            if example := self._example(a, b):
                lines.append(example)
            if variance := self._variance(a, b):
                lines.append(variance)
        return "\n".join(lines)

    def _example(self, a: str, b: str) -> str:
        """The most certain finding."""
        heads = _of(self.extra["heads"], a, b)
        if len(heads):
            first = heads.sort_values("p", kind="stable").iloc[0]["finding"]
            return f"For instance, {first}."
        found = _of(self.frame, a, b)
        found = found[found["found"].astype(bool)]
        if not len(found):
            return ""
        pair = found.iloc[0]
        return (
            f"For instance, {pair['sample_a']} conflicts with {pair['sample_b']} (cos {pair['cosine']:.2f}, "
            f"d {pair['effect_size']:.2f}, q {pair['q']:.2g}), most at {slice_name(pair)}."
        )

    def _variance(self, a: str, b: str) -> str:
        levels = _of(self.extra["levels"], a, b)
        whole = levels[levels["level"] == "whole"]
        if whole.empty or not np.isfinite(whole.iloc[0]["variance_between"]):
            return ""
        row: Any = whole.iloc[0]
        within, between = row["variance_within"], row["variance_between"]
        line = f"Mean cosine {row['mean']:+.3f} (samples of one task {row['reference']:+.3f}). "
        compared = (
            f"Variance of unit gradients: {within:.2f} within a task, {max(between, 0):.2f} between tasks"
        )
        if within > between:
            return f"{line}{compared}: what holds for the tasks on average says little of single samples."
        return f"{line}{compared}."


def _of(table: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    return table[(table["task_a"] == a) & (table["task_b"] == b)]


def matrix_name(first: int, second: int) -> str:
    """Variable with the cosines of two tasks, by their numbers; names of tasks may not fit a file format."""
    return f"cosine_{first}_{second}"


def sample_axis(task: int) -> str:
    """Axis of the samples of a task, by its number."""
    return f"sample_{task}"
