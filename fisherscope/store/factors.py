"""Reading factors of gradients: rows of outer products, whole gradients and slices formed of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.errors import CorruptStoreError
from fisherscope.layout import Partition
from fisherscope.linalg import Factored, LowRank
from fisherscope.store.dtypes import to_tensor
from fisherscope.store.factor_plan import FactoredPlace, LowRankPlace, RowsDataset, scale_name
from fisherscope.store.index import Chunk, TaskIndex
from fisherscope.store.mapped import MappedShard, as_slice
from fisherscope.store.memory import PIECE_BYTES
from fisherscope.store.opened import OpenStore
from fisherscope.store.presence import require

FactorPlace = FactoredPlace | LowRankPlace
EVERYTHING = slice(None)


@dataclass(frozen=True)
class _Rows:
    """One factor in one segment: ``[rows, columns]``, mapped.

    Attributes:
        shard, name, dtype: where it lies.
        values: the raw values.
        scales: of each row, for float16.
    """

    shard: MappedShard
    name: str
    dtype: str
    values: NDArray[np.generic]
    scales: NDArray[np.float32] | None

    def check(self, ranges: NDArray[np.int64]) -> None:
        """Check the bytes of some ranges of rows, ``[k, 2]``."""
        self.shard.check(self.name, ranges * self.values.shape[1] * self.values.itemsize)
        if self.scales is not None:
            self.shard.check(scale_name(self.name), ranges * self.scales.itemsize)

    def read(self, rows: slice | NDArray[np.int64], columns: slice) -> Tensor:
        """Some rows and columns, float32, copied."""
        values = to_tensor(np.array(self.values[rows, columns]), self.dtype).float()
        if self.scales is not None:
            values *= torch.from_numpy(np.array(self.scales[rows])).unsqueeze(1)
        return values


@dataclass(frozen=True)
class Terms:
    """The outer products of one parameter's gradients in one segment.

    Attributes:
        left, right: factors of axis 0 and of axis 1, row by row.
        bounds: the first row of each sample of the segment and the end of the last, ``[n + 1]``.
    """

    left: _Rows
    right: _Rows
    bounds: NDArray[np.int64]

    def check(self, positions: NDArray[np.int64]) -> None:
        """Check the bytes of some samples of the segment."""
        ranges = np.stack([self.bounds[positions], self.bounds[positions + 1]], 1)
        self.left.check(ranges)
        self.right.check(ranges)

    def counts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Outer products of some samples."""
        counts: NDArray[np.int64] = self.bounds[positions + 1] - self.bounds[positions]
        return counts

    def pieces(
        self, position: int, rows: slice = EVERYTHING, columns: slice = EVERYTHING
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One sample's factors ``[t, rows]`` and ``[t, columns]``, as many positions at a time as fit."""
        width = sum(factor.values.shape[1] for factor in (self.left, self.right))
        step = max(1, PIECE_BYTES // (8 * width))
        start, stop = int(self.bounds[position]), int(self.bounds[position + 1])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield self.left.read(slice(first, last), rows), self.right.read(slice(first, last), columns)

    def padded(self, positions: NDArray[np.int64], longest: int, *sides: slice) -> list[Tensor]:
        """Factors of some samples, ``[n, longest, width]`` each, zero behind a sample's own positions."""
        counts = self.counts(positions)
        inside = np.arange(longest) < counts[:, None]
        chosen = as_slice((self.bounds[positions, None] + np.arange(longest))[inside])
        out = []
        for factor, columns in zip((self.left, self.right), sides or (EVERYTHING, EVERYTHING), strict=True):
            rows = factor.read(chosen, columns)
            if (counts == longest).all():
                out.append(rows.view(len(positions), longest, rows.shape[1]))
                continue
            out.append(torch.zeros(len(positions), longest, rows.shape[1], dtype=torch.float32, device="cpu"))
            out[-1][torch.from_numpy(inside)] = rows
        return out

    def batches(self, chunk: Chunk, entries: int) -> Iterator[tuple[Chunk, int]]:
        """The samples of a chunk, as many at a time as fit with products of so many entries.

        Yields:
            The samples and the positions of the longest; one sample that does not fit has -1 there.
        """
        counts = self.counts(chunk.positions)
        width = sum(factor.values.shape[1] for factor in (self.left, self.right))
        start = 0
        while start < len(counts):
            longest, stop = int(counts[start]), start
            while stop < len(counts):
                most = max(longest, int(counts[stop]))
                if 8 * (stop + 1 - start) * (most * width + entries) > 2 * PIECE_BYTES:
                    break
                longest, stop = most, stop + 1
            fits = stop > start
            some = slice(start, stop if fits else start + 1)
            yield Chunk(chunk.segment, chunk.positions[some], chunk.targets[some]), longest if fits else -1
            start = some.stop


def terms_of(store: OpenStore, chunk: Chunk, place: FactorPlace) -> Terms:
    """The factors of a segment, with the bytes of a chunk's samples checked.

    Raises:
        NotStoredError: gradients of these samples were left out.
        CorruptStoreError: datasets do not fit each other, or are damaged.
    """
    require(store, chunk, place)
    shard, n = store.shard(chunk.segment.shard), len(chunk.segment.rows)
    rows = place.left
    bounds = np.arange(n + 1) * rows.rows if rows.family is None else _bounds(shard, rows.family, n)
    left, right = (_rows(store, shard, dataset, n, int(bounds[-1])) for dataset in (place.left, place.right))
    terms = Terms(left, right, bounds)
    terms.check(chunk.positions)
    return terms


def _bounds(shard: MappedShard, family: str, n: int) -> NDArray[np.int64]:
    name = f"{family}/offsets"
    shard.check(name)
    bounds = np.array(shard.view(name, (n + 1,), "int64"), dtype=np.int64)
    if bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise CorruptStoreError(f"{shard.path}: {name!r} does not ascend from 0")
    return bounds


def _rows(store: OpenStore, shard: MappedShard, rows: RowsDataset, n: int, total: int) -> _Rows:
    dtype = store.header.encodings.dtype
    shape = rows.shape(n, total)
    values = shard.view(rows.name, shape, dtype).reshape(-1, rows.columns)
    scales = None
    if dtype == "float16":
        scales = shard.view(scale_name(rows.name), shape[:-1], "float32").reshape(-1)
    return _Rows(shard, rows.name, dtype, values, scales)


def add_products(out: Tensor, terms: Terms, chunk: Chunk) -> None:
    """Bring the gradients of a chunk's samples to their places in ``out [n, *shape]``, zero there."""
    for few, longest in terms.batches(chunk, out[0].numel()):
        if longest >= 0:
            left, right = terms.padded(few.positions, longest)
            put(out, few, torch.bmm(left.mT, right))
            continue
        for left, right in terms.pieces(int(few.positions[0])):
            out[int(few.targets[0])].addmm_(left.mT, right)


def add_slices(out: Tensor, terms: Terms, chunk: Chunk, partition: Partition, starts: Sequence[int]) -> None:
    """Bring slices of a chunk's samples to their places in ``out [heads, n, slice size]``, zero there.

    Args:
        out: one slice for each of ``starts``.
        terms: the factors.
        chunk: the samples.
        partition: what is cut.
        starts: first indices of the wanted heads along its axis.
    """
    axis, width, shape = partition.axis, partition.width, partition.slice_shape
    lowest = min(starts)
    span = slice(lowest, max(starts) + width)
    sides = (span, EVERYTHING) if axis == 0 else (EVERYTHING, span)
    entries = (span.stop - span.start) * shape[1 - axis]
    for few, longest in terms.batches(chunk, entries):
        position, target = int(few.positions[0]), int(few.targets[0])
        if longest >= 0:
            left, right = terms.padded(few.positions, longest, *sides)
            products = torch.bmm(left.mT, right)
            for head, start in zip(out, starts, strict=True):
                put(head, few, products.narrow(axis + 1, start - lowest, width).flatten(1))
            continue
        for left, right in terms.pieces(position, *sides):
            for head, start in zip(out, starts, strict=True):
                inner = slice(start - lowest, start - lowest + width)
                mine, other = (left[:, inner], right) if axis == 0 else (left, right[:, inner])
                head[target].view(shape).addmm_(mine.mT, other)


def put(out: Tensor, chunk: Chunk, values: Tensor) -> None:
    """Copy the samples of a chunk to their places in ``out``."""
    places = as_slice(chunk.targets)
    out[places if isinstance(places, slice) else torch.from_numpy(places)] = values


def read_factors(
    store: OpenStore, index: TaskIndex, place: FactorPlace, chosen: NDArray[np.int64]
) -> Factored:
    """Factors of some samples, padded with zeros: a :class:`LowRank` where the store is one."""
    chunks = [(chunk, terms_of(store, chunk, place)) for chunk in index.chunks(chosen)]
    longest = max((int(terms.counts(c.positions).max()) for c, terms in chunks), default=0)
    left = torch.zeros(len(chosen), longest, place.left.columns, dtype=torch.float32, device="cpu")
    right = torch.zeros(len(chosen), longest, place.right.columns, dtype=torch.float32, device="cpu")
    for chunk, terms in chunks:
        for few, most in terms.batches(chunk, 0):
            if most >= 0:
                for out, rows in zip((left, right), terms.padded(few.positions, most), strict=True):
                    put(out[:, :most], few, rows)
                continue
            done, target = 0, int(few.targets[0])
            for mine, other in terms.pieces(int(few.positions[0])):
                end = done + len(mine)
                left[target, done:end], right[target, done:end] = mine, other
                done = end
    if isinstance(place, FactoredPlace):
        return Factored(left, right)
    return LowRank(left, right, torch.from_numpy(read_errors(store, index, place, chosen)))


def read_errors(
    store: OpenStore, index: TaskIndex, place: LowRankPlace, chosen: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Relative errors of some samples, ``[n]``; NaN where their gradients were left out."""
    out = np.full(len(chosen), np.nan, dtype=np.float32)
    for chunk in index.chunks(chosen):
        shard = store.shard(chunk.segment.shard)
        if place.error not in shard:
            continue
        shape = (len(chunk.segment.rows),)
        out[chunk.targets] = shard.rows(place.error, shape, "float32", chunk.positions)
    return out


def position_counts(
    store: OpenStore, index: TaskIndex, place: FactorPlace, chosen: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many outer products the gradients of some samples have, ``[n]``; 0 for those that were left out."""
    counts = np.zeros(len(chosen), dtype=np.int64)
    for chunk in index.chunks(chosen):
        n, rows = len(chunk.segment.rows), place.left
        if rows.name not in store.shard(chunk.segment.shard):
            continue
        if rows.family is None:
            counts[chunk.targets] = rows.rows
        else:
            bounds = _bounds(store.shard(chunk.segment.shard), rows.family, n)
            counts[chunk.targets] = bounds[chunk.positions + 1] - bounds[chunk.positions]
    return counts
