"""Reading per-sample gradients, whatever their encoding, into the shape of a parameter or of a head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.layout import Partition
from fisherscope.linalg.rounding import from_half
from fisherscope.store.dtypes import to_tensor
from fisherscope.store.factor_plan import FactoredPlace, LowRankPlace, scale_name
from fisherscope.store.factors import add_products, add_slices, terms_of
from fisherscope.store.gradient_plan import BlockDataset, Piece, WholeDataset
from fisherscope.store.index import Chunk, TaskIndex
from fisherscope.store.mapped import as_slice
from fisherscope.store.memory import PIECE_BYTES
from fisherscope.store.opened import OpenStore
from fisherscope.store.presence import require


def read_parameter(store: OpenStore, index: TaskIndex, parameter: str, chosen: NDArray[np.int64]) -> Tensor:
    """Gradients of some samples for a whole parameter, ``[n, *shape]``."""
    place = store.gradient_plan.places[parameter]
    out = _room(place, (len(chosen), *store.layout.parameter(parameter).shape))
    for chunk in index.chunks(chosen):
        require(store, chunk, place)
        if isinstance(place, WholeDataset):
            _read_whole(store, place, chunk, out)
        elif isinstance(place, FactoredPlace | LowRankPlace):
            add_products(out, terms_of(store, chunk, place), chunk)
        else:
            for dataset, piece in place:
                _read_blocks(store, dataset, piece, chunk, out)
    return out


def read_heads(
    store: OpenStore,
    index: TaskIndex,
    partition: Partition,
    chosen: NDArray[np.int64],
    heads: slice,
) -> Tensor:
    """Gradients of some samples for some heads of a partition, ``[heads, n, slice size]``."""
    place = store.gradient_plan.places[partition.parameter]
    starts = partition.starts[heads]
    out = _room(place, (len(starts), len(chosen), partition.slice_size))
    for chunk in index.chunks(chosen):
        require(store, chunk, place)
        if isinstance(place, WholeDataset):
            for few in _pieces(chunk, 10 * place.columns):
                values = _whole(store, place, few, slice(0, place.parameter_shape[0]))
                _put(out, few, partition.gather(values)[heads])
        elif isinstance(place, FactoredPlace | LowRankPlace):
            add_slices(out, terms_of(store, chunk, place), chunk, partition, starts)
        else:
            dataset, piece = next(found for found in place if found[1].partition == partition)
            for few in _pieces(chunk, 6 * dataset.columns):
                for number, head in enumerate(range(*heads.indices(dataset.heads))):
                    values = _heads(store, dataset, piece, few, slice(head, head + 1))
                    _put(out[number : number + 1], few, values)
    return out


def _room(place: object, shape: tuple[int, ...]) -> Tensor:
    """Where gradients of a place are put: products are added up there, anything else is copied whole."""
    if isinstance(place, FactoredPlace | LowRankPlace):
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _pieces(chunk: Chunk, sample_bytes: int) -> Iterator[Chunk]:
    """The samples of a chunk, so many at a time as fit a piece of memory."""
    step = max(1, PIECE_BYTES // max(sample_bytes, 1))
    for start in range(0, len(chunk.targets), step):
        some = slice(start, start + step)
        yield Chunk(chunk.segment, chunk.positions[some], chunk.targets[some])


def _put(out: Tensor, chunk: Chunk, values: Tensor) -> None:
    """Copy ``[heads, samples, ...]`` of a chunk to their places in ``out``, as float32."""
    places = as_slice(chunk.targets)
    if isinstance(places, slice):
        out[:, places].copy_(values)  # widens on the way
    else:
        out.index_copy_(1, torch.from_numpy(places), values.float())


def _place(out: Tensor, chunk: Chunk, values: Tensor) -> None:
    """Copy ``[samples, ...]`` of a chunk to their places in ``out``, as float32."""
    places = as_slice(chunk.targets)
    if isinstance(places, slice):
        out[places].copy_(values)
    else:
        out[torch.from_numpy(places)] = values.float()


def _read_blocks(store: OpenStore, dataset: BlockDataset, piece: Piece, chunk: Chunk, out: Tensor) -> None:
    """Bring the heads of one block to their places in ``out [n, *shape]``, one head at a time."""
    shape = piece.partition.slice_shape
    for few in _pieces(chunk, 6 * dataset.columns):
        for head, where in enumerate(piece.partition):
            values = _heads(store, dataset, piece, few, slice(head, head + 1))[0]
            _place(where.take(out), few, values.view(-1, *shape))


def _heads(store: OpenStore, dataset: BlockDataset, piece: Piece, chunk: Chunk, heads: slice) -> Tensor:
    """Some heads of some samples, ``[heads, samples, columns]`` of the stored type, or float32."""
    dtype, n = store.header.gradient_dtype, len(chunk.segment.rows)
    shard = store.shard(chunk.segment.shard)
    shape, columns = (dataset.heads, n, dataset.columns), slice(piece.start, piece.stop)
    raw = shard.head_rows(dataset.name, shape, dtype, chunk.positions, heads, columns)
    values = to_tensor(raw, dtype)
    if dtype != "float16":
        return values
    name, one = scale_name(dataset.name), (dataset.heads, n, 1)
    scales = shard.head_rows(name, one, "float32", chunk.positions, heads, slice(None))
    return from_half(values, torch.from_numpy(scales)[..., 0])


def _read_whole(store: OpenStore, place: WholeDataset, chunk: Chunk, out: Tensor) -> None:
    """Bring the samples of a chunk to their places in ``out [n, *shape]``."""
    shape = place.shape(len(chunk.segment.rows))
    # a large table is read some of its rows at a time
    height = max(1, PIECE_BYTES * shape[1] // max(6 * place.columns, 1))
    for few in _pieces(chunk, 6 * place.columns):
        places = as_slice(few.targets)
        where = places if isinstance(places, slice) else torch.from_numpy(places)
        for top in range(0, shape[1], height):
            rows = slice(top, min(top + height, shape[1]))
            out[where, rows] = _whole(store, place, few, rows)


def _whole(store: OpenStore, place: WholeDataset, chunk: Chunk, rows: slice) -> Tensor:
    """Some rows of a parameter for some samples, ``[samples, rows, ...]`` float32."""
    dtype, shape = store.header.gradient_dtype, place.shape(len(chunk.segment.rows))
    shard = store.shard(chunk.segment.shard)
    values = to_tensor(shard.row_parts(place.name, shape, dtype, chunk.positions, rows), dtype)
    if dtype != "float16":
        return values.float()
    name, scaled = scale_name(place.name), shape[: -place.row_axes]
    if len(scaled) == 1:
        return from_half(values, torch.from_numpy(shard.rows(name, scaled, "float32", chunk.positions)))
    return from_half(
        values, torch.from_numpy(shard.row_parts(name, scaled, "float32", chunk.positions, rows))
    )
