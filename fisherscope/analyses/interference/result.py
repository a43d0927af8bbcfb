"""The result of the interference analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import xarray as xr
from typing_extensions import override

from fisherscope.analyses.interference.permutation import NAMES
from fisherscope.analyses.interference.signed import CLAIM
from fisherscope.analyses.interference.totals import NUMBERS
from fisherscope.analyses.result import Result
from fisherscope.analyses.units import head_maps, role_of, slice_name
from fisherscope.words import counted

HEALTH = ["fisher_min", "fisher_median", "fisher_max", "below_epsilon", "ridge"]
MAPS = [*NUMBERS, *NAMES, *CLAIM, *HEALTH]

_LEVEL = 0.05


@dataclass(kw_only=True, eq=False, repr=False)
class InterferenceResult(Result):
    """Interference per ordered pair of tasks and head slice.

    ``frame`` columns: task_a, task_b, stack, layer, block, head (kv head for K and V); of M over the pairs
    of samples ``mean``, ``min`` and ``max``, ``sample_q95`` (the 95 % quantile over task_a's samples of a
    sample's mean score), and the split into ``magnitude`` and ``overlap`` (NaN for signed forms); of the
    test of overlap ``effect``, ``p``, ``p_max`` and ``q`` (see
    :class:`~fisherscope.analyses.interference.permutation.OverlapTest`; NaN where nothing was tested);
    whether samples oppose each other there ``cosine``, ``cosine_p`` and ``cosine_q`` (mean cosine and test of
    it, as in the conflict analysis: :func:`~fisherscope.analyses.conflict.block_test.block_test`; the same
    for every form);
    ``fisher_min``, ``fisher_median``, ``fisher_max``, ``below_epsilon``, ``ridge``, ``flat``. ``data`` holds
    the same (but ``flat``) with axes (task_a, task_b, layer, block, head), NaN where a block has fewer
    heads. ``extra["pairs"]``: the sample pairs of each ordered pair of tasks that stand out, by score or,
    where scores have a sign, by absolute value: task_a, task_b, sample_i, sample_j, stack, layer, block,
    head, score, text_i, text_j (texts where stored). With the form "full" these leave both samples out of F.
    ``details["gqa"]`` maps query heads to kv heads.
    """

    @property
    def signed(self) -> bool:
        """Whether scores below 0 mean conflict and above 0 synergy."""
        return self.config["form"] in {"signed", "full"}

    @override
    def top(
        self, k: int = 10, *, task_a: str | None = None, task_b: str | None = None, block: str | None = None
    ) -> pd.DataFrame:
        """The sample pairs with the highest scores over all slices; the largest, where scores have a sign."""
        rows = self.extra["pairs"]
        for column, wanted in (("task_a", task_a), ("task_b", task_b), ("block", block)):
            if wanted is not None:
                rows = rows[rows[column] == wanted]
        return (
            rows.sort_values("score", ascending=False, kind="stable", key=abs).head(k).reset_index(drop=True)
        )

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
        """The column that tells slices apart: "sample_q95" where C_i is over the first task's F, else "mean".

        With the F of task A and all its samples, the mean of C_i / F over i is 1, so that the mean score
        says nothing about A's contributions.
        """
        one_sided = self.config["form"] in {"unsigned", "natural"}
        return "sample_q95" if one_sided and self.config["fisher_pool"] == "A" else "mean"

    @override
    def summary(self) -> str:
        lines = []
        for (a, b), rows in self.frame.groupby(["task_a", "task_b"], sort=False):
            lines.append(self._told(str(a), str(b), rows))
            if tested := _tested(rows):
                lines.append(f"{a} on {b}: {tested}")
        lines.append(_READING[self.config["form"]])
        return "\n".join(lines)

    def _told(self, a: str, b: str, rows: pd.DataFrame) -> str:
        value = self.telling
        if rows[value].isna().all():
            return f"{a} on {b}: no pairs of samples."
        if rows["fisher_max"].isna().all():
            return f"{a} on {b}: nothing can be told, since gradients of one of them are not stored."
        worst = rows.sort_values(value, ascending=self.signed, kind="stable").iloc[0]
        what = "mean score" if value == "mean" else f"score that 5% of {a}'s samples exceed"
        extreme = "lowest" if self.signed else "highest"
        line = f"{a} on {b}: the {what} is {extreme} at {slice_name(worst)} ({worst[value]:.3g}"
        overall = rows[value].mean()
        relative = not self.signed and overall > 0
        line += f", {worst[value] / overall:.1f} times the mean over all slices)." if relative else ")."
        if len(best := self.top(1, task_a=a, task_b=b)):
            pair = best.iloc[0]
            which = f"Largest score, {pair['score']:.3g}" if self.signed else "Highest pair"
            line += f" {which}: {pair['sample_i']} on {pair['sample_j']} at {slice_name(pair)}."
        return line


def _tested(rows: pd.DataFrame) -> str:
    """What the test of overlap found, or "" where there was none."""
    known = rows[rows["q"].notna()]
    if known.empty:
        return ""
    found = known[known["q"] < _LEVEL]
    if found.empty:
        return (
            f"samples of both overlap as those within a task do, on each of {counted(len(known), 'slice')} "
            "(no q < .05)."
        )
    apart, together = (found["effect"] < 0).sum(), (found["effect"] > 0).sum()
    first = found.sort_values("effect", ascending=False, kind="stable", key=abs).iloc[0]
    return (
        f"on {apart} of {counted(len(known), 'slice')} samples of both overlap less than samples "
        f"within a task (the tasks use them differently), on {together} more "
        f"(q < .05); most at {slice_name(first)} (effect {first['effect']:+.2g}, q {first['q']:.2g})."
    )


_UNSIGNED = (
    "Scores say where the second task moves what the first leans on, not whether that helps or harms, and "
)
_READING = {
    "unsigned": _UNSIGNED + "they grow with the second task's gradients: compare slices, not pairs of tasks.",
    "natural": _UNSIGNED + "do not depend on the scale of the loss.",
    "symmetric": "Scores say where samples of both tasks move the same entries, not whether that helps or "
    "harms.",
    "signed": "Scores below 0 are conflict, above 0 synergy. They are descriptions: whether a mean differs "
    "from 0 is for the tests of `conflict`.",
    "full": "Scores below 0 are conflict, above 0 synergy, measured by the whole Fisher matrix of a slice. "
    "The scores of single pairs leave both samples out of it. They are descriptions, not tests.",
}
