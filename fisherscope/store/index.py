"""Where each committed sample of each task lies: the journals of all ranks, in task order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherscope.errors import CorruptStoreError
from fisherscope.store.ledger import Ledger, latest
from fisherscope.store.records import SegmentRecord, SnapshotRecord, TaskRecord
from fisherscope.words import counted


@dataclass(frozen=True)
class Chunk:
    """Samples that lie in one segment.

    Attributes:
        segment: the segment.
        positions: their positions in the segment.
        targets: their places in what was asked for.
    """

    segment: SegmentRecord
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class TaskIndex:
    """The committed samples of one task, in row order.

    Attributes:
        task: as declared.
        complete: whether all samples are committed and in the aggregates.
        segments: of all ranks.
        rows: row number of each committed sample, ascending ``[n]``.
        segment: its segment's number ``[n]``.
        position: its position in the segment ``[n]``.
        snapshots: the latest aggregates, in order of rank.
    """

    task: TaskRecord
    complete: bool
    segments: tuple[SegmentRecord, ...]
    rows: NDArray[np.int64]
    segment: NDArray[np.int64]
    position: NDArray[np.int64]
    snapshots: tuple[SnapshotRecord, ...]

    @classmethod
    def build(cls, name: str, ledgers: Sequence[Ledger]) -> TaskIndex:
        """Gather what the journals hold about a task."""
        mine = [ledger for ledger in ledgers if name in ledger.tasks]
        segments = tuple(segment for ledger in mine for segment in ledger.segments[name].values())
        snapshots = tuple(ledger.snapshots[name] for ledger in mine if name in ledger.snapshots)
        sizes = np.array([len(s.rows) for s in segments], dtype=np.int64)
        rows = np.fromiter(chain.from_iterable(s.rows for s in segments), np.int64, int(sizes.sum()))
        order = np.argsort(rows, kind="stable")
        task = latest(name, mine)
        return cls(
            task=task,
            complete=len(rows) == task.n == sum(snapshot.count for snapshot in snapshots),
            segments=segments,
            rows=rows[order],
            segment=np.repeat(np.arange(len(segments)), sizes)[order],
            position=(np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes))[order],
            snapshots=snapshots,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def limited_to(self, known: TaskIndex) -> TaskIndex:
        """The same samples as before, where they lie now; aggregates may cover more by now."""
        kept = np.isin(self.rows, known.rows, assume_unique=True)
        return replace(
            self,
            task=known.task,
            complete=known.complete,
            rows=self.rows[kept],
            segment=self.segment[kept],
            position=self.position[kept],
        )

    def select(self, samples: slice | Sequence[int] | NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Positions in task order of the samples asked for.

        Raises:
            IndexError: there are not so many samples.
        """
        if samples is None:
            samples = slice(None)
        if isinstance(samples, slice):
            return np.arange(len(self))[samples]
        chosen = np.asarray(samples)
        if chosen.dtype == bool:
            raise IndexError("samples must be a slice or whole numbers, not a mask: use np.flatnonzero(mask)")
        if chosen.size and chosen.dtype.kind not in "iu":
            raise IndexError(f"samples must be a slice or whole numbers, not {chosen.dtype} values")
        chosen = chosen.astype(np.int64).reshape(-1)
        if len(chosen) and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(
                f"task {self.task.name!r} has {counted(len(self), 'sample')}, "
                f"asked for {chosen.min()}..{chosen.max()}"
            )
        return np.where(chosen < 0, chosen + len(self), chosen)

    def chunks(self, chosen: NDArray[np.int64]) -> Iterator[Chunk]:
        """The chosen samples by segment."""
        if not len(chosen):
            return
        owner = self.segment[chosen]
        by_segment = np.argsort(owner, kind="stable")
        numbers, starts = np.unique(owner[by_segment], return_index=True)
        for number, targets in zip(numbers, np.split(by_segment, starts[1:]), strict=True):
            yield Chunk(self.segments[number], self.position[chosen[targets]], targets)


def build_index(root: Path, ledgers: Sequence[Ledger]) -> dict[str, TaskIndex]:
    """The index of every task, in order of declaration.

    Raises:
        CorruptStoreError: a segment's rows and the header disagree.
    """
    names = list(dict.fromkeys(name for ledger in ledgers for name in ledger.tasks))
    index = {name: TaskIndex.build(name, ledgers) for name in names}
    for name, task in index.items():
        if len(task.rows) and (task.rows[-1] >= task.task.n or not np.diff(task.rows).all()):
            raise CorruptStoreError(f"{root}: the journals disagree about the rows of task {name!r}")
    return index
