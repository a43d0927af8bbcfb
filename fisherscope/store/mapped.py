"""Reading one committed shard through a memory map, by the journal's word and never by libhdf5's."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.errors import CorruptStoreError
from fisherscope.store import disk
from fisherscope.store.checksum import crc32_hex
from fisherscope.store.dtypes import stored_type, to_tensor
from fisherscope.store.schema import SHARD_DIRECTORY
from fisherscope.store.shard_record import DatasetRecord, ShardRecord

Ranges: TypeAlias = NDArray[np.int64] | Sequence[tuple[int, int]]
Checked: TypeAlias = dict[str, NDArray[np.bool_]]  # per dataset, which blocks were checked


class MappedShard:
    """A shard, mapped read-only. Every block is checked against its crc32 before it is first read."""

    def __init__(self, root: Path, record: ShardRecord, checked: Checked | None = None) -> None:
        """Map the shard.

        Args:
            root: directory of the store.
            record: of the journal.
            checked: what was checked of this shard before, brought up to date here.

        Raises:
            CorruptStoreError: it is missing, no regular file, or has not the committed size.
        """
        self.path = root / SHARD_DIRECTORY / record.file
        self._datasets = {dataset.name: dataset for dataset in record.datasets}
        self._checked = {} if checked is None else checked
        try:
            fd = disk.open_inside(root, SHARD_DIRECTORY, record.file)
        except FileNotFoundError:
            raise CorruptStoreError(
                f"{self.path} was committed and is missing: restore it from a copy"
            ) from None
        try:
            size = os.fstat(fd).st_size
            if size != record.nbytes or not size:
                raise CorruptStoreError(
                    f"{self.path} has {size} bytes, {record.nbytes} were committed: restore it from a copy"
                )
            self._map = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def __contains__(self, name: object) -> bool:
        return name in self._datasets

    def dataset(self, name: str) -> DatasetRecord:
        """The record of a dataset.

        Raises:
            CorruptStoreError: the shard has no such dataset.
        """
        try:
            return self._datasets[name]
        except KeyError:
            raise CorruptStoreError(f"{self.path} lacks the dataset {name!r}: collect again") from None

    def view(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """A dataset as a read-only array of its raw type, unchecked: call :meth:`check` on what you read.

        Raises:
            CorruptStoreError: the dataset has another shape or type than expected.
        """
        spec = self.dataset(name).spec
        if spec.shape != shape or spec.dtype != dtype:
            raise CorruptStoreError(
                f"{self.path}: {name!r} is {spec.dtype} of shape {spec.shape}, expected {dtype} of {shape}"
            )
        kind, count = stored_type(dtype).raw, math.prod(shape)
        flat = np.frombuffer(
            self._map, dtype=kind, count=count, offset=self.dataset(name).offset if count else 0
        )
        return flat.reshape(shape)

    def check(self, name: str, ranges: Ranges | None = None) -> None:
        """Check the blocks that hold some bytes of a dataset, each one once.

        Args:
            name: of the dataset.
            ranges: first and last byte (exclusive), from the dataset's start, ``[k, 2]``; by default all of
                it.

        Raises:
            CorruptStoreError: a block is damaged; the message names shard, dataset and offset.
        """
        record = self.dataset(name)
        grid = record.grid
        done = self._checked.setdefault(name, np.zeros(len(grid), dtype=bool))
        if not done.all():
            whole = [(0, grid.nbytes)] if ranges is None else ranges
            wanted = grid.touched(np.asarray(whole, dtype=np.int64).reshape(-1, 2))
            for block in np.flatnonzero(wanted & ~done).tolist():
                self._check_block(record, block)
                done[block] = True

    def _check_block(self, record: DatasetRecord, block: int) -> None:
        start, stop = record.grid.bounds(block)
        with memoryview(self._map) as whole, whole[record.offset + start : record.offset + stop] as data:
            found = crc32_hex(data)
        if found != record.crc32[8 * block : 8 * block + 8]:
            raise CorruptStoreError(
                f"{self.path}: dataset {record.name!r} is damaged between bytes {record.offset + start} and "
                f"{record.offset + stop} of the file. Restore the shard from a copy"
            )

    def tensor(self, name: str) -> Tensor:
        """A whole dataset, checked and copied: a writable tensor of the stored type."""
        spec = self.dataset(name).spec
        self.check(name)
        return to_tensor(np.array(self.view(name, spec.shape, spec.dtype)), spec.dtype)

    def rows(self, name: str, shape: tuple[int, ...], dtype: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows (first axis) of a dataset of the expected shape, checked and copied."""
        view = self.view(name, shape, dtype)
        row_bytes = view[:1].nbytes
        self.check(name, _ranges(rows, row_bytes))
        return np.array(view[as_slice(rows)])

    def row_parts(
        self, name: str, shape: tuple[int, ...], dtype: str, rows: NDArray[np.int64], inner: slice
    ) -> NDArray[Any]:
        """A stretch of the second axis of some rows (first axis) of a dataset, checked and copied.

        Args:
            name, shape, dtype: of the dataset, as expected.
            rows: which.
            inner: indices of the second axis, from the first to the last (exclusive).
        """
        view = self.view(name, shape, dtype)
        step = math.prod(shape[2:]) * view.itemsize
        starts = rows * shape[1] * step
        self.check(name, np.stack([starts + inner.start * step, starts + inner.stop * step], 1))
        return np.array(view[as_slice(rows), inner])

    def head_rows(
        self,
        name: str,
        shape: tuple[int, int, int],
        dtype: str,
        rows: NDArray[np.int64],
        heads: slice,
        columns: slice,
    ) -> NDArray[Any]:
        """Some rows and columns of some heads of a head-major dataset, checked and copied.

        Only the bytes of these heads are touched.
        """
        view = self.view(name, shape, dtype)
        row_bytes = shape[2] * view.itemsize
        chosen = range(*heads.indices(shape[0]))
        out = np.empty((len(chosen), len(rows), len(range(*columns.indices(shape[2])))), dtype=view.dtype)
        for index, head in enumerate(chosen):
            self.check(name, _ranges(head * shape[1] + rows, row_bytes))
            out[index] = view[head, as_slice(rows), columns]
        return out


def _ranges(rows: NDArray[np.int64], row_bytes: int) -> NDArray[np.int64]:
    """The bytes of some rows, ``[k, 2]``."""
    together = as_slice(rows)
    if isinstance(together, slice):
        return np.array([(together.start * row_bytes, together.stop * row_bytes)])
    return np.stack([rows, rows + 1], 1) * row_bytes


def as_slice(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """The same rows as a slice where they are consecutive: numpy then copies them in one piece."""
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return slice(int(rows[0]), int(rows[0]) + len(rows))
    return rows
