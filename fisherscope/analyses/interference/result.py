"""The result of the interference analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import xarray as xr
from typing_extensions import override

from fisherscope.analyses.result import Result
from fisherscope.analyses.units import head_maps, role_of, slice_name

MAPS = ["mean", "sample_q95", "max", "fisher_min", "fisher_median", "fisher_max", "below_epsilon", "ridge"]


@dataclass(kw_only=True, eq=False, repr=False)
class InterferenceResult(Result):
    """Interference per ordered pair of tasks and head slice.

    ``frame`` columns: task_a, task_b, stack, layer, block, head (kv head for K and V), ``mean`` and
    ``max`` of M over the pairs of samples, ``sample_q95`` (the 95 % quantile over task_a's samples of a
    sample's mean score), ``fisher_min``, ``fisher_median``, ``fisher_max``,
    ``below_epsilon``, ``ridge``, ``flat``. ``data`` holds the same (but ``flat``) with axes (task_a,
    task_b, layer, block, head), NaN where a block has fewer heads. ``extra["pairs"]``: the
    highest-scoring sample pairs of each ordered pair of tasks: task_a, task_b, sample_i, sample_j, stack,
    layer, block, head, score, text_i, text_j (texts where stored). ``details["gqa"]`` maps query heads to
    kv heads.
    """

    @override
    def top(
        self, k: int = 10, *, task_a: str | None = None, task_b: str | None = None, block: str | None = None
    ) -> pd.DataFrame:
        """The sample pairs with the highest scores over all slices."""
        rows = self.extra["pairs"]
        for column, wanted in (("task_a", task_a), ("task_b", task_b), ("block", block)):
            if wanted is not None:
                rows = rows[rows[column] == wanted]
        return rows.sort_values("score", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def per_query_head(self) -> xr.Dataset:
        """``data`` with query heads along ``head`` in every block.

        The values of K and V are those of the kv head that each query head uses: they repeat, they are not
        further measurements (``attrs["note"]`` says so).
        """
        users: dict[tuple[Any, ...], list[int]] = {}
        for layer in self.details["gqa"]:
            for query, kv in enumerate(layer["kv_head"]):
                users.setdefault((layer["stack"], layer["layer"], kv), []).append(query)
        shared = self.frame["block"].map(role_of).isin(["K", "V"])
        own = [
            users[row.stack, row.layer, row.head] if kv else [row.head]
            for row, kv in zip(self.frame.itertuples(), shared, strict=True)
        ]
        repeated = self.frame.assign(head=pd.Series(own, dtype=object)).explode("head", ignore_index=True)
        tasks = list(self.details["samples"])
        data = head_maps(repeated.astype({"head": int}), MAPS, {"task_a": tasks, "task_b": tasks})
        data.attrs["note"] = "K and V repeat the value of the kv head that each query head uses"
        return data

    @property
    def telling(self) -> str:
        """The column that tells slices apart: "sample_q95" where F is the first task's, else "mean".

        With the F of task A and all its samples, the mean of C_i / F over i is 1, so that the mean score is
        the mean of ``|g_j|``: it says nothing about A.
        """
        return "sample_q95" if self.config["fisher_pool"] == "A" else "mean"

    @override
    def summary(self) -> str:
        lines = []
        for (a, b), rows in self.frame.groupby(["task_a", "task_b"], sort=False):
            value = self.telling
            worst = rows.sort_values(value, ascending=False, kind="stable").iloc[0]
            if pd.isna(worst[value]):
                lines.append(f"{a} on {b}: no pairs of samples.")
                continue
            what = "mean score" if value == "mean" else f"score that 5% of {a}'s samples exceed"
            line = f"{a} on {b}: the {what} is highest at {slice_name(worst)} ({worst[value]:.3g}"
            overall = rows[value].mean()
            line += (
                f", {worst[value] / overall:.1f} times the mean over all slices)." if overall > 0 else ")."
            )
            if len(best := self.top(1, task_a=str(a), task_b=str(b))):
                pair = best.iloc[0]
                line += f" Highest pair: {pair['sample_i']} on {pair['sample_j']} at {slice_name(pair)}."
            lines.append(line)
        lines.append(
            "Scores say where the second task moves what the first leans on, not whether that helps or "
            "harms, and they grow with the second task's gradients: compare slices, not pairs of tasks."
        )
        return "\n".join(lines)
