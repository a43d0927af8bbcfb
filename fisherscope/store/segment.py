"""Writing the samples of one segment, piece by piece as they are computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.errors import StoreError
from fisherscope.store.dtypes import to_raw
from fisherscope.store.gradient_writer import GradientWriter
from fisherscope.store.plan import SegmentPlan
from fisherscope.store.shard import ShardFile
from fisherscope.store.skeleton import DatasetSpec

CreateShard = Callable[[SegmentPlan], ShardFile]
CommitShard = Callable[["SegmentWriter", ShardFile, int], None]


class SegmentWriter:
    """A segment of samples on its way to the disk; made by :meth:`StoreWriter.segment`.

    Every piece goes to its place in the file at once: memory holds no more than the parts of one batch
    of one block, until its weight and its bias are both there.

    Attributes:
        task: whose samples these are.
        rows: row numbers in the order of the segment: piece ``start_row`` counts positions in this list.
    """

    def __init__(
        self,
        task: str,
        rows: tuple[int, ...],
        plan: SegmentPlan,
        create: CreateShard,
        commit: CommitShard,
    ) -> None:
        self.task = task
        self.rows = rows
        self._plan = plan
        self._create = create
        self._commit = commit
        self._written = {name: np.zeros(plan.n, dtype=bool) for name in plan.specs}
        self._gradients = GradientWriter(plan, self.put)
        self._shard: ShardFile | None = create(plan)
        try:
            self.put("sample/row", 0, np.asarray(rows, dtype=np.int64))
            for family, offsets in plan.offsets.items():
                self._shard.write(f"{family}/offsets", to_raw(offsets, "int64"))
                self._written[f"{family}/offsets"][:] = True
        except BaseException:
            self.abort()
            raise

    def put(self, dataset: str, start_row: int, array: Any) -> None:
        """Write some rows of a dataset.

        Args:
            dataset: one of ``sample/*``, ``ids/*``, ``text/bytes``, ``positions/*``, ``groups/*``,
                ``parameters/*``, ``gradients/*``, ``factors/*``, ``lowrank/*`` or ``scales/*``, in the shape
                and the type that the segment stores.
            start_row: position in the segment of the first row.
            array: ``[b, ...]``; for a head-major dataset ``[heads, b, columns]``; for a ragged one the
                rows' values one after the other, or a list with one array (or bytes) per row.

        Raises:
            KeyError: the segment has no such dataset.
            ValueError: the array does not fit.
            StoreFullError: the disk is full.
        """
        shard = self._open_shard()
        if dataset not in self._plan.specs or dataset.endswith("/offsets"):
            raise KeyError(
                f"the segment has no dataset {dataset!r} to write: it has {sorted(self._plan.specs)}"
            )
        spec = self._plan.specs[dataset]
        if dataset in self._plan.ragged:
            self.put_ragged(dataset, start_row, array)
            return
        raw = to_raw(array, spec.dtype)
        head_major = dataset in self._plan.head_major
        b = raw.shape[1] if head_major and raw.ndim > 1 else len(raw) if raw.ndim else 0
        expected = (spec.shape[0], b, spec.shape[2]) if head_major else (b, *spec.shape[1:])
        if raw.shape != expected or not 0 <= start_row <= self._plan.n - b:
            raise ValueError(
                f"{dataset!r} of {self._plan.n} rows has shape {spec.shape}: cannot put an array of shape "
                f"{raw.shape} at row {start_row}"
            )
        if dataset == "sample/row" and not np.array_equal(raw, self.rows[start_row : start_row + b]):
            raise ValueError("sample/row is given by the segment, and these are other rows")
        if head_major:
            self._write_heads(shard, dataset, start_row, raw)
        else:
            shard.write(dataset, raw, start_row * (raw.nbytes // max(b, 1)))
        self._written[dataset][start_row : start_row + b] = True

    def put_ragged(self, dataset: str, start_row: int, array: Any) -> None:
        """Write some rows of a ragged dataset.

        Args:
            dataset: one of ``ids/input``, ``labels/ids``, ``text/bytes``, ``positions/*``.
            start_row: position in the segment of the first row.
            array: one array (or bytes) per row, or their values one after the other.

        Raises:
            KeyError: the segment has no such ragged dataset.
            ValueError: the lengths are not those that the segment was opened with.
            StoreFullError: the disk is full.
        """
        shard = self._open_shard()
        if dataset not in self._plan.ragged:
            raise KeyError(
                f"the segment has no ragged dataset {dataset!r}: it has {sorted(self._plan.ragged)}"
            )
        spec, offsets = self._plan.specs[dataset], self._plan.offsets[self._plan.ragged[dataset]]
        if not 0 <= start_row < self._plan.n:
            raise ValueError(f"the segment has {self._plan.n} rows, there is no row {start_row}")
        if isinstance(array, (list, tuple)) and array and not isinstance(array[0], (int, np.integer)):
            pieces = [_values(item, spec) for item in array]
            stop_row = start_row + len(pieces)
            given = np.cumsum([0, *map(len, pieces)]) + offsets[start_row]
            fits = stop_row <= self._plan.n and np.array_equal(given, offsets[start_row : stop_row + 1])
            raw = np.concatenate(pieces)
        else:
            raw = _values(array, spec)
            end = offsets[start_row] + len(raw)
            stop_row = int(np.searchsorted(offsets, end, side="right")) - 1
            fits = offsets[stop_row] == end
        if not fits:
            raise ValueError(
                f"{dataset!r}: the values from row {start_row} do not have the lengths that the segment "
                "was opened with"
            )
        shard.write(dataset, raw, int(offsets[start_row]) * raw.itemsize * math.prod(spec.shape[1:]))
        self._written[dataset][start_row:stop_row] = True

    def lengths(self, dataset: str, start_row: int, n: int) -> list[int]:
        """How many entries some rows have in a ragged dataset, as the segment was opened.

        Raises:
            KeyError: the segment has no such ragged dataset.
        """
        if dataset not in self._plan.ragged:
            raise KeyError(
                f"the segment has no ragged dataset {dataset!r}: it has {sorted(self._plan.ragged)}"
            )
        offsets = self._plan.offsets[self._plan.ragged[dataset]]
        lengths: list[int] = np.diff(offsets[start_row : start_row + n + 1]).tolist()
        return lengths

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of its samples are to be put."""
        return self._plan.gradients is not None

    @property
    def gradients(self) -> GradientWriter:
        """Where factors and approximations of gradients are put.

        Raises:
            StoreError: the segment is closed.
        """
        self._open_shard()
        return self._gradients

    def put_gradient(self, parameter: str, start_row: int, gradients: Tensor) -> None:
        """Write the gradients of some samples for one parameter that are kept as they are.

        Args:
            parameter: one of the store's gradient parameters.
            start_row: position in the segment of the first sample.
            gradients: ``[b, *shape]``, signed, on any device; rounded to the store's type.

        Raises:
            KeyError: gradients of this parameter are not stored here, or as factors.
            ValueError: the tensor does not fit.
            StoreFullError: the disk is full.
        """
        self.gradients.put_dense(parameter, start_row, gradients)

    def _write_heads(self, shard: ShardFile, dataset: str, start_row: int, raw: NDArray[Any]) -> None:
        heads, b, columns = raw.shape
        if b == self._plan.n:
            shard.write(dataset, raw)
            return
        row_bytes = columns * raw.itemsize
        for head in range(heads):
            shard.write(dataset, raw[head], (head * self._plan.n + start_row) * row_bytes)

    def commit(self, rows: int | None = None) -> None:
        """Seal the segment and commit it: when this returns, the samples are in the store.

        Args:
            rows: commit only so many samples from the start and drop the others; all by default. With 0
                nothing is committed.

        Raises:
            StoreError: a dataset lacks some of these rows; the segment stays open.
            StoreFullError: the disk is full; the segment is lost, what was committed before stays.
        """
        shard = self._open_shard()
        n = self._plan.n if rows is None else rows
        if not 0 <= n <= self._plan.n:
            raise ValueError(f"the segment has {self._plan.n} rows, cannot commit {n}")
        if n == 0:
            self.abort()
            return
        self._check_written(n)
        self._shard = None
        if n < self._plan.n:
            try:
                smaller = self._create(self._plan.first(n))
                try:
                    smaller.copy_from(shard)
                except BaseException:
                    smaller.discard()
                    raise
            finally:
                shard.discard()
            shard = smaller
        self._gradients.waiting.clear()
        self._commit(self, shard, n)

    def _check_written(self, n: int) -> None:
        for name, written in self._written.items():
            if not written[:n].all():
                missing = int(np.argmin(written[:n]))
                waiting = [f"rows {k[1]}..{k[1] + k[2] - 1}" for k in self._gradients.waiting if k[0] == name]
                hint = f" (only some parts of {', '.join(waiting)} came)" if waiting else ""
                raise StoreError(
                    f"segment of task {self.task!r}: {name!r} was not written for row {self.rows[missing]}"
                    f", {int((~written[:n]).sum())} of {n} rows are missing{hint}: put them before commit()"
                )

    def abort(self) -> None:
        """Give the segment up and remove its file; does nothing after a commit."""
        shard, self._shard = self._shard, None
        self._gradients.waiting.clear()
        if shard is not None:
            shard.discard()

    @property
    def bytes_written(self) -> int:
        """Bytes written so far; 0 once the segment is closed."""
        return 0 if self._shard is None else self._shard.bytes_written

    @property
    def is_open(self) -> bool:
        """Whether it was neither committed nor given up."""
        return self._shard is not None

    def _open_shard(self) -> ShardFile:
        if self._shard is None:
            raise StoreError(f"the segment of task {self.task!r} is closed: open another for further rows")
        return self._shard

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _values(values: Any, spec: DatasetSpec) -> NDArray[Any]:
    """Entries of a ragged dataset, ``[entries, *columns]``."""
    if isinstance(values, (bytes, bytearray)):
        values = np.frombuffer(values, dtype=np.uint8)
    raw = to_raw(values, spec.dtype)
    if raw.shape[1:] != spec.shape[1:] or not raw.ndim:
        columns = f" x {spec.shape[1:]}" if spec.shape[1:] else ""
        raise ValueError(f"entries of {spec.name!r} must lie along one axis{columns}, got shape {raw.shape}")
    return raw
