"""Which heads and channels matter to which task, and how sure that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from typing_extensions import override

from fisherscope.analyses import bootstrap
from fisherscope.analyses.config import ImportanceConfig
from fisherscope.analyses.context import Context
from fisherscope.analyses.groupvalues import group_chunks
from fisherscope.analyses.registry import register
from fisherscope.analyses.result import Result
from fisherscope.analyses.units import Units, head_maps, slice_name
from fisherscope.store import ContributionStore
from fisherscope.words import several

Array = NDArray[np.float64]

_PLACE = ["kind", "stack", "layer", "block", "index", "parameter", "size"]


def ranks(scores: Array) -> NDArray[np.int64]:
    """Rank of each score along the last axis, 1 for the highest; among equals the first comes first."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(1, scores.shape[-1] + 1), order.shape), -1)
    return found


def shares(scores: Array, labels: NDArray[np.integer] | None = None) -> Array:
    """Scores divided by their sum, over all or within equal labels; 0 where the sum is 0.

    Args:
        scores: ``[k]``, not negative.
        labels: ``[k]`` numbers from 0, or None for one group of all.

    Returns:
        ``[k]``; they sum to 1 within each label.
    """
    index = np.zeros(len(scores), np.int64) if labels is None else labels
    total = np.bincount(index, weights=scores)[index]
    return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation; NaN where one side is constant or has fewer than two values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def rank_bootstrap(
    values: Array, top_k: int, resamples: Array, memory_budget: int
) -> tuple[Array, Array, Array]:
    """How often each column is among the top k when the samples are drawn anew.

    Args:
        values: per-sample scores ``[n, k]``.
        top_k: length of the list.
        resamples: ``[replicates, n]`` weights.
        memory_budget: bytes for the resampled scores held at a time.

    Returns:
        P(in top-k), and the 2.5 % and 97.5 % quantiles of the rank, ``[k]`` each.
    """
    found = np.empty((len(resamples), values.shape[1]), np.int32)
    step = max(1, memory_budget // (32 * max(1, values.shape[1])))
    for start in range(0, len(resamples), step):
        found[start : start + step] = ranks(resamples[start : start + step] @ values)
    low, high = np.quantile(found, [0.025, 0.975], axis=0, method="nearest")
    return (found <= top_k).mean(0), low, high


@dataclass(kw_only=True, eq=False, repr=False)
class ImportanceResult(Result):
    """Rankings per task and kind.

    ``frame`` columns: task, kind, stack, layer, block, index, parameter, size, ``score`` (mean F per entry),
    ``layer_share`` (sums to 1 per task, kind and layer), ``global_share`` (sums to 1 per task and kind),
    ``rank``, ``p_top`` (probability of being among the top k), ``rank_low``, ``rank_high``; saliencies of
    setting the group to zero: first order ``taylor`` = ``|mean_i <g_i, theta>|`` (Molchanov et al. 2019) and
    ``taylor_abs`` = ``mean_i |<g_i, theta>|`` (Michel et al. 2019), second order ``obd`` = mean F of the
    group times ``sum theta^2 / 2`` (LeCun et al. 1990, with F taken as equal within the group).

    ``extra["tasks"]``: Spearman correlation of the rankings of each pair of tasks, per kind.
    ``extra["differences"]``: global share of each head slice in one task minus that in another.
    ``data``: score, layer_share, global_share, rank, p_top of head slices, axes (task, layer, block, head).
    """

    @override
    def top(self, k: int = 10, *, kind: str = "head", task: str | None = None) -> pd.DataFrame:
        """The units of one kind with the largest share in their task."""
        rows = self.frame[self.frame["kind"] == kind]
        if task is not None:
            rows = rows[rows["task"] == task]
        return rows.sort_values("global_share", ascending=False, kind="stable").head(k).reset_index(drop=True)

    @override
    def summary(self) -> str:
        lines = []
        for task, rows in self.frame[self.frame["kind"] == "head"].groupby("task", sort=False):
            best = rows.sort_values("rank").iloc[0]
            line = (
                f"{task}: {slice_name(best, head='index')} carries {best['global_share']:.1%} of the Fisher "
            )
            line += f"score of {_all_slices(len(rows))}"
            if np.isfinite(best["p_top"]):
                k = self.config["top_k"]
                sure = int(((rows["rank"] <= k) & (rows["p_top"] >= 0.95)).sum())
                stay = several(sure, "stays", "stay")
                line += f"; {sure} of the top {min(k, len(rows))} {stay} there in 95 % of resamples"
            lines.append(line + ".")
        for row in self.extra["tasks"].to_dict("records"):
            if row["kind"] == "head" and np.isfinite(row["spearman"]):
                names = f"{row['task_a']} and {row['task_b']}"
                lines.append(f"Head rankings of {names} correlate with {row['spearman']:.2f} (Spearman).")
        return "\n".join(lines) or "No heads or channels to rank."


def _all_slices(number: int) -> str:
    return "the one head slice" if number == 1 else f"all {number:,} head slices"


@register("importance", requires=("groups",), config=ImportanceConfig)
def importance(store: ContributionStore, config: ImportanceConfig, context: Context) -> ImportanceResult:
    """Heads and channels ranked by F, per layer and over the model, compared between tasks.

    Returns:
        An :class:`ImportanceResult` over all chosen tasks.
    """
    units = Units.of_layout(store.layout, store.parameters)
    chosen = {
        kind: np.flatnonzero(((units.frame["kind"] == kind) & (units.frame["part"] == "weight")).to_numpy())
        for kind in config.kinds
    }
    frames = []
    for task in context.tasks:
        frames.extend(_task_frames(store, task, units, chosen, config, context))
    frame = pd.concat(frames, ignore_index=True)
    heads = frame[frame["kind"] == "head"].rename(columns={"index": "head"})
    columns = ["score", "layer_share", "global_share", "rank", "p_top"]
    return ImportanceResult(
        name="importance",
        config=asdict(config),
        frame=frame,
        data=head_maps(heads, columns, {"task": context.tasks}) if len(heads) else None,
        extra={"tasks": _compare(frame, context), "differences": _differences(heads)},
    )


def _task_frames(
    store: ContributionStore,
    task: str,
    units: Units,
    chosen: dict[str, NDArray[np.int64]],
    config: ImportanceConfig,
    context: Context,
) -> list[pd.DataFrame]:
    groups, total = units.groups, 0
    square, dot, dot_abs = np.zeros(groups), np.zeros(groups), np.zeros(groups)
    kept: dict[str, list[Array]] = {kind: [] for kind in chosen if kind in config.bootstrap_kinds}
    for chunk in group_chunks(store, task, context.memory_budget):
        values = chunk.contributions(store.header.normalization)
        total += len(values)
        square += values.sum(0)
        dot += chunk.dot.sum(0)
        dot_abs += np.abs(chunk.dot).sum(0)
        for kind, part in kept.items():
            part.append(values[:, chosen[kind]] / units.sizes[chosen[kind]])
    theta = store.groups(task)["theta_square"].to_numpy(np.float64)
    frames = []
    for kind, places in chosen.items():
        frame = units.frame.loc[places, _PLACE].reset_index(drop=True)
        frame.insert(0, "task", task)
        size = units.sizes[places]
        score = square[places] / total / size
        frame["score"] = score
        frame["layer_share"] = shares(
            score, frame.groupby(["stack", "layer"], sort=False).ngroup().to_numpy()
        )
        frame["global_share"] = shares(score)
        frame["rank"] = ranks(score)
        frame["p_top"] = frame["rank_low"] = frame["rank_high"] = np.nan
        if config.bootstrap and kind in kept and total > 1 and len(places):
            resamples = bootstrap.weights(total, config.bootstrap, context.rng("importance", task))
            frame["p_top"], frame["rank_low"], frame["rank_high"] = rank_bootstrap(
                np.concatenate(kept[kind]), config.top_k, resamples, context.memory_budget
            )
        frame["taylor"] = np.abs(dot[places]) / total
        frame["taylor_abs"] = dot_abs[places] / total
        frame["obd"] = score * theta[places] / 2
        frames.append(frame)
    return frames


def _compare(frame: pd.DataFrame, context: Context) -> pd.DataFrame:
    rows = []
    for kind, part in frame.groupby("kind", sort=False):
        scores = {task: rows_["score"].to_numpy() for task, rows_ in part.groupby("task", sort=False)}
        for a, b in context.pairs:
            rows.append((kind, a, b, len(scores[a]), spearman(scores[a], scores[b])))
    return pd.DataFrame(rows, columns=["kind", "task_a", "task_b", "units", "spearman"])


def _differences(heads: pd.DataFrame) -> pd.DataFrame:
    """Difference of the global shares of each head slice for each pair of tasks, largest first."""
    place = ["stack", "layer", "block", "head"]
    columns = ["task_a", "task_b", *place, "share_a", "share_b", "difference"]
    parts = []
    by_task = {task: rows.reset_index(drop=True) for task, rows in heads.groupby("task", sort=False)}
    for a, b in combinations(by_task, 2):
        part = by_task[a][place].assign(task_a=a, task_b=b)
        part["share_a"], part["share_b"] = by_task[a]["global_share"], by_task[b]["global_share"]
        part["difference"] = part["share_a"] - part["share_b"]
        parts.append(part.sort_values("difference", key=abs, ascending=False, kind="stable"))
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
