"""Stored gradients in the representation that their encoding gives them, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherscope.linalg import Dense, PerSampleGradient
from fisherscope.store import memory
from fisherscope.store.factor_plan import FactoredPlace, LowRankPlace
from fisherscope.store.factors import position_counts, read_errors, read_factors
from fisherscope.store.gradients import read_parameter
from fisherscope.store.index import TaskIndex
from fisherscope.store.opened import OpenStore
from fisherscope.store.presence import is_stored

_STREAM_BYTES = 256 << 20


def read(store: OpenStore, index: TaskIndex, parameter: str, chosen: NDArray[np.int64]) -> PerSampleGradient:
    """Gradients of some samples as they are stored."""
    place = store.gradient_plan.places[parameter]
    size = int(_sample_bytes(store, index, parameter, chosen).max(initial=0))
    memory.refuse_beyond(store.memory_budget, f"gradients of {parameter}", len(chosen), size)
    if not isinstance(place, FactoredPlace | LowRankPlace):
        return Dense(read_parameter(store, index, parameter, chosen))
    return read_factors(store, index, place, chosen)


def pieces(store: OpenStore, index: TaskIndex, parameter: str) -> Iterator[slice]:
    """All samples in order, cut so that the gradients of each piece fit the memory budget."""
    every = np.arange(len(index))
    place = store.gradient_plan.places[parameter]
    missing = [c.targets.min() for c in index.chunks(every) if not is_stored(store, c, place)]
    # what is there before the first sample without gradients comes first; then reading says which lacks them
    there = int(min(missing, default=len(index)))
    sizes = _sample_bytes(store, index, parameter, every)
    start = 0
    while start < len(index):
        stop = _end_of_piece(sizes[: there if start < there else None], start, store.memory_budget)
        yield slice(start, stop)
        start = stop


def _end_of_piece(sizes: NDArray[np.int64], start: int, budget: int) -> int:
    """Where the next piece ends: at least one sample, of which reading says if not even that one fits."""
    largest = 1
    for stop in range(start, len(sizes)):
        # padding makes all samples of a piece as large as its largest
        largest = max(largest, int(sizes[stop]))
        if stop > start and stop - start >= min(memory.fitting(largest, budget), _STREAM_BYTES // largest):
            return stop
    return len(sizes)


def _sample_bytes(
    store: OpenStore, index: TaskIndex, parameter: str, chosen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Bytes of each sample in memory, as it is stored but in float32, ``[n]``."""
    place, shape = store.gradient_plan.places[parameter], store.layout.parameter(parameter).shape
    if not isinstance(place, FactoredPlace | LowRankPlace):
        return np.full(len(chosen), 4 * math.prod(shape), dtype=np.int64)
    return position_counts(store, index, place, chosen) * 4 * sum(shape)


def errors(store: OpenStore, index: TaskIndex) -> pd.DataFrame:
    """The table of :meth:`ContributionStore.encoding_errors`."""
    chosen = np.arange(len(index))
    ids = pd.Index([f"{index.task.name}_{row}" for row in index.rows], name="id", dtype="str")
    places = [p for p in store.gradient_plan.places.values() if isinstance(p, LowRankPlace)]
    columns = {place.parameter: read_errors(store, index, place, chosen) for place in places}
    return pd.DataFrame(columns, index=ids)
