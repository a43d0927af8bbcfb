"""What a store keeps of the samples themselves: ids, labels, losses, texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fisherscope.instrument.planning import TaskPlan
from fisherscope.store import SegmentWriter


def ragged_lengths(task: TaskPlan, rows: Sequence[int], *, store_text: bool) -> dict[str, list[int]]:
    """How many entries each sample has of what samples have differently many of."""
    samples = [task.samples[row] for row in rows]
    lengths = {
        "ids": [len(s.input_ids) for s in samples],
        "labels": [len(s.labels) for s in samples],
        "positions": [s.length for s in samples],
    }
    if _has_types(task):
        lengths["types"] = [len(s.token_types or ()) for s in samples]
    if store_text:
        lengths["text"] = [len((s.text or "").encode()) for s in samples]
    return lengths


def put_samples(
    segment: SegmentWriter,
    start: int,
    task: TaskPlan,
    rows: Sequence[int],
    losses: Tensor,
    *,
    store_text: bool,
) -> None:
    """Write what is known of some samples, of which the first is row ``start`` of the segment."""
    samples = [task.samples[row] for row in rows]
    segment.put("sample/row", start, np.array(rows, dtype=np.int64))
    segment.put("sample/length", start, np.array([s.length for s in samples], dtype=np.int32))
    segment.put("sample/tokens", start, np.array([s.tokens for s in samples], dtype=np.int32))
    segment.put("sample/truncated", start, np.array([s.truncated for s in samples], dtype=np.int32))
    segment.put("sample/loss", start, losses.numpy())
    segment.put_ragged("ids/input", start, [np.array(s.input_ids, dtype=np.int32) for s in samples])
    segment.put_ragged("labels/ids", start, [np.array(s.labels, dtype=np.int32) for s in samples])
    if _has_types(task):
        types = [np.array(s.token_types or (), dtype=np.int32) for s in samples]
        segment.put_ragged("types/ids", start, types)
    if store_text:
        texts = [np.frombuffer((s.text or "").encode(), dtype=np.uint8) for s in samples]
        segment.put_ragged("text/bytes", start, texts)


def _has_types(task: TaskPlan) -> bool:
    return any(sample.token_types is not None for sample in task.samples)
