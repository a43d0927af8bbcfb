"""Natural-gradient cosines of every pair of samples of different tasks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.cosines import effect_size
from fisherscope.analyses.conflict.grams import PairGrams, pair_grams
from fisherscope.analyses.conflict.result import ConflictResult, matrix_name, sample_axis
from fisherscope.analyses.context import Context
from fisherscope.analyses.registry import register
from fisherscope.analyses.slices import SliceReader, gqa_map
from fisherscope.analyses.top import TopPairs
from fisherscope.analyses.units import head_maps
from fisherscope.store import ContributionStore

Matrices = dict[tuple[str, str], NDArray[np.float64]]

_MAPS = ["mean", "min", "share_negative", "reference", "excess"]
_PLACE = ["stack", "layer", "block", "head"]
_LEVELS = ["task_a", "task_b", "level", *_PLACE, *_MAPS, "undefined", "ridge", "flat"]
_FRAME = [
    "task_a", "task_b", "sample_a", "sample_b", "cosine", "reference", "excess", "effect_size", *_PLACE,
    "slice_cosine",
]  # fmt: skip


@register("conflict", requires=("gradients",), config=ConflictConfig, min_tasks=2)
def conflict(store: ContributionStore, config: ConflictConfig, context: Context) -> ConflictResult:
    """Which samples of two tasks pull the attention weights in opposite directions.

    Returns:
        A :class:`ConflictResult` over all pairs of tasks.
    """
    reader = SliceReader(store, context.memory_budget)
    rows = {task: reader.rows(task, config.max_samples_per_task) for task in context.tasks}
    levels: list[dict[str, Any]] = []
    frames: list[pd.DataFrame] = []
    matrices: Matrices = {}
    for a, b in context.pairs:
        found = pair_grams(reader, a, b, rows, config)
        levels.extend({"task_a": a, "task_b": b, **row} for row in found.rows)
        frames.append(_pairs(store, a, b, found, config))
        if found.cosine.size <= config.matrix_limit:
            matrices[a, b] = found.cosine
    table = pd.DataFrame(levels).reindex(columns=_LEVELS)
    frame = pd.concat(frames, ignore_index=True).sort_values("cosine", kind="stable", ignore_index=True)
    return ConflictResult(
        name="conflict",
        config={**asdict(config), "fisher_pool": "pooled", "fisher_source": reader.source},
        frame=frame,
        data=_data(store, table, matrices, context.tasks),
        extra={"levels": table},
        details={"gqa": gqa_map(store), "samples": rows},
        warnings=_warnings(reader, rows, table),
    )


def _pairs(
    store: ContributionStore, a: str, b: str, found: PairGrams, config: ConflictConfig
) -> pd.DataFrame:
    """The most opposed pairs that lie far enough below the reference."""
    reference = found.rows[-1]["reference"]
    top = TopPairs(config.top_pairs)
    top.offer(-found.cosine, 0)
    i, j = top.places[:, 1], top.places[:, 2]
    frame = pd.DataFrame({"task_a": a, "task_b": b, "cosine": -top.scores}, index=range(len(i)))
    first, second = store.samples(a), store.samples(b)
    frame["sample_a"], frame["sample_b"] = first["id"].to_numpy()[i], second["id"].to_numpy()[j]
    frame["reference"] = reference
    frame["excess"] = frame["cosine"] - reference
    frame["effect_size"] = effect_size(frame["cosine"].to_numpy())
    worst = found.lowest_slice[i, j]
    for column in _PLACE:
        frame[column] = [found.slices[k][column] for k in worst]
    frame["slice_cosine"] = found.lowest[i, j].astype(np.float64)
    columns = list(_FRAME)
    if "text" in first and "text" in second:
        frame["text_a"], frame["text_b"] = first["text"].to_numpy()[i], second["text"].to_numpy()[j]
        columns += ["text_a", "text_b"]
    # without a reference (one sample per task) there is no excess to filter by
    kept = ~(frame["excess"] > -config.min_effect_size)
    return frame.loc[kept, columns]


def _data(
    store: ContributionStore,
    table: pd.DataFrame,
    matrices: Matrices,
    tasks: tuple[str, ...],
) -> xr.Dataset:
    slices = table[table["level"] == "slice"]
    mirrored = slices.rename(columns={"task_a": "task_b", "task_b": "task_a"})
    both = pd.concat([slices, mirrored], ignore_index=True)
    data = head_maps(both, _MAPS, {"task_a": tasks, "task_b": tasks})
    for (a, b), values in matrices.items():
        i, j = tasks.index(a), tasks.index(b)
        for k, n in zip((i, j), values.shape, strict=True):
            data.coords[sample_axis(k)] = store.samples(tasks[k])["id"].to_numpy()[:n]
        attributes = {"task_a": a, "task_b": b}
        data[matrix_name(i, j)] = ((sample_axis(i), sample_axis(j)), values, attributes)
    return data


def _warnings(reader: SliceReader, rows: dict[str, int], table: pd.DataFrame) -> list[str]:
    notes = []
    for task, used in rows.items():
        if used < (n := reader.rows(task)):
            notes.append(f"pairs use the first {used} of the {n} samples of {task!r}; F uses all")
    slices = table[table["level"] == "slice"]
    if flat := int(slices["flat"].astype(bool).sum()):
        notes.append(f"{flat} of {len(slices)} slices have F = 0 throughout and no cosines")
    return notes
