"""Reading per-sample gradients back into the shape of their parameter or of a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.errors import NotStoredError
from fisherscope.layout import Partition
from fisherscope.store.dtypes import to_tensor
from fisherscope.store.gradient_plan import BlockDataset, Piece, WholeDataset
from fisherscope.store.index import Chunk, TaskIndex
from fisherscope.store.mapped import as_slice

if TYPE_CHECKING:
    from fisherscope.store.reader import ContributionStore


def read_parameter(
    store: ContributionStore, index: TaskIndex, parameter: str, chosen: NDArray[np.int64]
) -> Tensor:
    """Gradients of some samples for a whole parameter, ``[n, *shape]``."""
    place = store.gradient_plan.places[parameter]
    out = torch.empty((len(chosen), *store.layout.parameter(parameter).shape))
    for chunk in index.chunks(chosen):
        if isinstance(place, WholeDataset):
            _put(out, chunk, _whole(store, place, chunk), 0)
            continue
        values = torch.empty((len(chunk.targets), *out.shape[1:]))
        for dataset, piece in place:
            piece.partition.scatter(_heads(store, dataset, piece, chunk, slice(None)), values)
        _put(out, chunk, values, 0)
    return out


def read_heads(
    store: ContributionStore,
    index: TaskIndex,
    partition: Partition,
    chosen: NDArray[np.int64],
    heads: slice,
) -> Tensor:
    """Gradients of some samples for some heads of a partition, ``[heads, n, slice size]``."""
    place = store.gradient_plan.places[partition.parameter]
    count = len(range(*heads.indices(len(partition))))
    out = torch.empty((count, len(chosen), partition.slice_size))
    for chunk in index.chunks(chosen):
        if isinstance(place, WholeDataset):
            values = partition.gather(_whole(store, place, chunk))[heads]
        else:
            dataset, piece = next(found for found in place if found[1].partition == partition)
            values = _heads(store, dataset, piece, chunk, heads)
        _put(out, chunk, values, 1)
    return out


def _put(out: Tensor, chunk: Chunk, values: Tensor, dim: int) -> None:
    """Copy the samples of a chunk to their places along ``dim``, as float32."""
    places = as_slice(chunk.targets)
    if isinstance(places, slice):
        out.narrow(dim, places.start, places.stop - places.start).copy_(values)
    else:
        out.index_copy_(dim, torch.from_numpy(places), values.float())


def _heads(
    store: ContributionStore, dataset: BlockDataset, piece: Piece, chunk: Chunk, heads: slice
) -> Tensor:
    dtype, n = store.header.gradient_dtype, len(chunk.segment.rows)
    shard = store.shard(chunk.segment.shard)
    _require(store, chunk, dataset.name)
    shape = (dataset.heads, n, dataset.columns)
    raw = shard.head_rows(dataset.name, shape, dtype, chunk.positions, heads, slice(piece.start, piece.stop))
    return to_tensor(raw, dtype)


def _whole(store: ContributionStore, dataset: WholeDataset, chunk: Chunk) -> Tensor:
    dtype = store.header.gradient_dtype
    _require(store, chunk, dataset.name)
    shard = store.shard(chunk.segment.shard)
    raw = shard.rows(dataset.name, dataset.shape(len(chunk.segment.rows)), dtype, chunk.positions)
    return to_tensor(raw, dtype)


def _require(store: ContributionStore, chunk: Chunk, name: str) -> None:
    segment = chunk.segment
    if name not in store.shard(segment.shard):
        row = segment.rows[int(chunk.positions[0])]
        raise NotStoredError(
            f"the gradients of sample {segment.task}_{row} were not stored: collect again with "
            "SampleGradients(max_samples=None), or ask for fewer samples"
        )
