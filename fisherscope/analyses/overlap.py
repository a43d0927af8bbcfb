"""What two tasks both keep, against what chance alone would have them share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from typing_extensions import override

from fisherscope.analyses.chance import expected_jaccard, overlap_p_value
from fisherscope.analyses.config import OverlapConfig
from fisherscope.analyses.context import Context
from fisherscope.analyses.importance import shares
from fisherscope.analyses.masks import WORDS, MasksResult
from fisherscope.analyses.registry import register
from fisherscope.analyses.result import Result
from fisherscope.analyses.units import layer_label, slice_name
from fisherscope.store import ContributionStore
from fisherscope.words import level

# What an overlap beyond chance means, by the band of the Jaccard index.
_ADVICE = {
    "high": "expect interference when merging; consider task-specific adapters",
    "medium": "merge with chosen weights and check the shared slices first",
    "low": "most of what they keep is their own; check the few shared slices before merging",
}
_KEYS = ["task_a", "task_b", "kind", "sparsity"]
_COUNTS = ["units", "kept_a", "kept_b", "shared"]
_COLUMNS = [
    *_KEYS, "level", "stack", "layer", *_COUNTS, "jaccard", "chance", "excess", "coefficient", "p_value",
]  # fmt: skip
_REGIONS = [*_KEYS, "stack", "layer", "block", "index", "share_a", "share_b", "score"]


@dataclass(kw_only=True, eq=False, repr=False)
class OverlapResult(Result):
    """Overlap of the masks of each pair of tasks.

    ``frame`` columns: task_a, task_b, kind, sparsity, level ("all" or "layer"), stack, layer; units,
    kept_a, kept_b, shared; ``jaccard`` = shared / either; ``chance`` = its expectation for independent
    random masks of these sizes; ``excess`` = jaccard - chance; ``coefficient`` = shared / smaller mask;
    ``p_value`` = upper tail of the hypergeometric distribution, uncorrected for the number of rows. For
    single weights the null is weak: weights of a row are not independent, so nearly every p-value is
    tiny; read the excess. ``extra["regions"]``: head slices and channels that both tasks keep, by the
    smaller (or the product) of their shares of F. ``extra["advice"]``: one line of advice per pair, kind
    and sparsity.
    """

    @override
    def top(self, k: int = 10) -> pd.DataFrame:
        """The slices kept by both tasks that weigh most in both, at the highest sparsity."""
        regions: pd.DataFrame = self.extra["regions"]
        regions = regions[regions["sparsity"] == regions["sparsity"].max()]
        return regions.sort_values("score", ascending=False, kind="stable").head(k).reset_index(drop=True)

    @override
    def summary(self) -> str:
        advice = self.extra["advice"]
        shown = advice[advice["sparsity"] == advice["sparsity"].max()]
        lines = [row["advice"] for row in shown.to_dict("records")]
        if len(best := self.top(1)):
            row = best.iloc[0]
            name = (
                slice_name(row, head="index")
                if row["kind"] == "head"
                else f"{layer_label(row)} channel {row['index']}"
            )
            lines.append(
                f"Both {row['task_a']} and {row['task_b']} lean on {name} "
                f"({row['share_a']:.1%} and {row['share_b']:.1%} of their Fisher score of that kind)."
            )
        return "\n".join(lines) or "No masks to compare."


@register("overlap", requires=("groups",), config=OverlapConfig, min_tasks=2)
def overlap(_store: ContributionStore, config: OverlapConfig, context: Context) -> OverlapResult:
    """Shared structure of the masks of each pair of tasks, with its chance level and advice.

    Returns:
        An :class:`OverlapResult` over the masks of the `masks` analysis.
    """
    masks = cast(MasksResult, context.result("masks"))
    cells = pd.DataFrame(_cells(masks, context), columns=[*_KEYS, "stack", "layer", *_COUNTS])
    layers = cells.groupby([*_KEYS, "stack", "layer"], sort=False)[_COUNTS].sum().reset_index()
    whole = cells.groupby(_KEYS, sort=False)[_COUNTS].sum().reset_index()
    frame = pd.concat(
        [whole.assign(level="all", stack="", layer=-1), layers.assign(level="layer")], ignore_index=True
    )
    frame = _measure(frame)
    advice = [
        {**{key: row[key] for key in _KEYS}, "advice": advise(row, config)}
        for row in frame[frame["level"] == "all"].to_dict("records")
    ]
    return OverlapResult(
        name="overlap",
        config={**asdict(config), "masks": masks.config},
        frame=frame[_COLUMNS],
        extra={
            "regions": _regions(masks, config, context),
            "advice": pd.DataFrame(advice, columns=[*_KEYS, "advice"]),
        },
        warnings=list(masks.warnings),
    )


def _cells(masks: MasksResult, context: Context) -> Iterator[tuple[Any, ...]]:
    """Counts per pair, kind, sparsity and place; places add up to layers."""
    sparsities = masks.config["sparsities"]
    for a, b in context.pairs:
        for kind, found in masks.structured.items():
            labels = found.units.groupby(["stack", "layer"], sort=False).ngroup().to_numpy()
            places = found.units[["stack", "layer"]].drop_duplicates().to_records(index=False)
            for sparsity in sparsities:
                keep_a, keep_b = found.keep[a, sparsity], found.keep[b, sparsity]
                counts = [
                    np.bincount(labels, weights=weight, minlength=len(places)).astype(int)
                    for weight in (np.ones(len(labels)), keep_a, keep_b, keep_a & keep_b)
                ]
                for place, *row in zip(places, *counts, strict=True):
                    yield a, b, kind, sparsity, place[0], int(place[1]), *row
        if masks.unstructured is not None:
            single = masks.unstructured
            for sparsity in sparsities:
                for info in single.parameters:
                    key = sparsity, info.name
                    both = single.mask(a, *key) & single.mask(b, *key)
                    counts_ = (single.counts[a, *key], single.counts[b, *key], int(both.sum()))
                    yield a, b, "unstructured", sparsity, info.stack, info.layer, both.numel(), *counts_


def _measure(frame: pd.DataFrame) -> pd.DataFrame:
    either = frame["kept_a"] + frame["kept_b"] - frame["shared"]
    smaller = frame[["kept_a", "kept_b"]].min(axis=1)
    counts = frame[_COUNTS].to_numpy(np.int64).tolist()
    frame["jaccard"] = frame["shared"] / either.where(either > 0)
    frame["chance"] = [expected_jaccard(n, a, b) for n, a, b, _ in counts]
    frame["excess"] = frame["jaccard"] - frame["chance"]
    frame["coefficient"] = frame["shared"] / smaller.where(smaller > 0)
    frame["p_value"] = [overlap_p_value(shared, n, a, b) for n, a, b, shared in counts]
    return frame


def advise(row: dict[Any, Any], config: OverlapConfig) -> str:
    """One line of advice from the band of the Jaccard index and from its excess over chance."""
    jaccard, chance, excess = row["jaccard"], row["chance"], row["excess"]
    what = WORDS[row["kind"]]
    start = f"{row['task_a']} and {row['task_b']}, {what} at {level(row['sparsity'])} sparsity: "
    if not np.isfinite(jaccard):
        return start + "no mask keeps anything, so there is nothing to compare."
    more = excess > 0 and row["p_value"] < config.alpha
    band = "high" if jaccard > config.high else "medium" if jaccard >= config.low else "low"
    start += f"Jaccard {jaccard:.2f} against {chance:.2f} by chance, {excess:+.2f}: "
    if more:
        return f"{start}{band} and more than chance; {_ADVICE[band]}."
    if band == "low":
        return (
            f"{start}low, no more than chance; the tasks keep different structure, and merging by task "
            "arithmetic is the first thing to try."
        )
    return (
        f"{start}the index is {band}, but masks of this size share that much by chance: no evidence that the "
        "tasks need the same structure."
    )


def _regions(masks: MasksResult, config: OverlapConfig, context: Context) -> pd.DataFrame:
    """Slices and channels that both tasks keep, those with the largest shares of F first."""
    parts = []
    for kind, found in masks.structured.items():
        share = {task: shares(scores) for task, scores in found.scores.items()}
        for a, b in context.pairs:
            for sparsity in masks.config["sparsities"]:
                both = np.flatnonzero(found.keep[a, sparsity] & found.keep[b, sparsity])
                part = found.units.iloc[both][["stack", "layer", "block", "index"]]
                part = part.assign(task_a=a, task_b=b, kind=kind, sparsity=sparsity)
                part["share_a"], part["share_b"] = share[a][both], share[b][both]
                pair = part[["share_a", "share_b"]]
                part["score"] = pair.min(axis=1) if config.rank_by == "min" else pair.prod(axis=1)
                parts.append(part.nlargest(config.regions, "score"))
    return pd.concat(parts, ignore_index=True)[_REGIONS] if parts else pd.DataFrame(columns=_REGIONS)
