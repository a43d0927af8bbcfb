"""Writing a store: one writer per rank, every commit durable before the call returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fisherscope.errors import FingerprintError, StoreError
from fisherscope.store import disk, lifecycle
from fisherscope.store.disk import Durability
from fisherscope.store.gradient_plan import GradientPlan
from fisherscope.store.journal import Journal
from fisherscope.store.ledger import Ledger, check_agreement, keys_digest, read_ledgers
from fisherscope.store.plan import SegmentPlan
from fisherscope.store.records import (
    CompleteRecord,
    ConstantsRecord,
    JournalStart,
    Record,
    SegmentRecord,
    ShardRecord,
    SnapshotRecord,
    TaskRecord,
    decode,
    encode,
    shard_name,
    task_name,
)
from fisherscope.store.schema import FORMAT_VERSION, SHARD_DIRECTORY, StoreHeader
from fisherscope.store.segment import SegmentWriter
from fisherscope.store.shard import ShardFile
from fisherscope.store.skeleton import DatasetSpec
from fisherscope.store.snapshot import Arrays, Snapshot, read_snapshot, write_arrays


class StoreWriter:
    """The one process that writes as a rank of a store; a context manager.

    Attributes:
        path: the store's directory.
        header: what the store is a store of.
        rank: of this writer.
        durability: "power": a commit survives the loss of power. "process": it survives the death of the
            process, and :meth:`close` makes everything survive the loss of power. "none": nothing is synced.
    """

    def __init__(
        self,
        path: Path,
        header: StoreHeader,
        journal: Journal,
        ledger: Ledger,
        others: Sequence[Ledger],
        durability: Durability,
    ) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.header = header
        self.rank = ledger.rank
        self.durability = durability
        self._journal = journal
        self._ledger = ledger
        self._others = list(others)
        self._keys: dict[str, tuple[str, ...]] = {}
        self._segments: list[SegmentWriter] = []
        self._gradients = GradientPlan.build(header.layout, header.gradient_parameters)
        self._created = 0
        self._unsynced: list[Path] = []
        self._bytes = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        header: StoreHeader,
        *,
        rank: int = 0,
        durability: Durability = "power",
        resume: bool = True,
    ) -> StoreWriter:
        """Create a store, or go on with one that the same run began.

        What a crash left behind (a torn line, temporary files, shards that were not committed) is removed.

        Raises:
            StoreExistsError: the directory holds something else, or a store and ``resume`` is False.
            StoreFormatError: it has another format version.
            FingerprintError: it is the store of another run; the message names the keys that differ.
            StoreLockedError: another process writes as this rank.
            CorruptStoreError: something that was committed is missing or damaged.
        """
        if durability not in disk.DURABILITIES:
            raise ValueError(f"durability {durability!r} is none of {list(disk.DURABILITIES)}")
        if not 0 <= rank <= 9999:
            raise ValueError(f"rank must be 0 to 9999, not {rank}")
        root = Path(path)
        stored, digest = lifecycle.create_or_check(root, header, durability, resume=resume)
        journal = Journal(root, rank, durability)
        try:
            ledger = Ledger.replay(journal.path, rank, digest, journal.found)
            others = [other for other in read_ledgers(root, digest) if other.rank != rank]
            check_agreement(root, [ledger, *others])
            lifecycle.check_shards(root, ledger, durability)
            lifecycle.remove_leftovers(root, ledger)
            writer = cls(root, stored, journal, ledger, others, durability)
            if not ledger.records:
                writer._append(JournalStart(rank, digest))
        except BaseException:
            journal.close()
            raise
        return writer

    @property
    def tasks(self) -> dict[str, TaskRecord]:
        """The tasks that this rank declared, in order."""
        return dict(self._ledger.tasks)

    @property
    def bytes_written(self) -> int:
        """Bytes that this writer has written into shards, those of open segments included."""
        return self._bytes + sum(segment.bytes_written for segment in self._segments)

    def declare_task(self, name: str, keys: Sequence[str]) -> None:
        """Say which samples a task has; a second time with the same keys does nothing.

        Args:
            name: of the task.
            keys: one per sample, in row order.

        Raises:
            FingerprintError: the store has a task of this name with other samples.
            ValueError: the name or a key cannot be stored.
        """
        record = TaskRecord(task_name(name), len(keys), keys_digest(keys))
        for ledger in (self._ledger, *self._others):
            known = ledger.tasks.get(name)
            if known is not None and known != record:
                what = (
                    f"{known.n} samples in the store, {record.n} now"
                    if known.n != record.n
                    else f"{record.n} samples as before, but other ones or in another order"
                )
                raise FingerprintError(
                    f"task {name!r} of {self.path} holds other data: {what}. Use the data that the store "
                    "was begun with, or collect into another directory"
                )
        if name not in self._ledger.tasks:
            self._append(record)
        self._keys[name] = tuple(keys)

    def committed_rows(self, task: str) -> set[int]:
        """Rows whose samples are committed, by this rank or (when it was opened) by any other."""
        return set().union(*(ledger.rows.get(task, set()) for ledger in (self._ledger, *self._others)))

    def segment(
        self,
        task: str,
        rows: Sequence[int],
        *,
        ragged: Mapping[str, Sequence[int]] | None = None,
        gradients: bool = True,
    ) -> SegmentWriter:
        """Open a segment and reserve its bytes on the disk.

        Args:
            task: declared before.
            rows: row numbers, in the order in which their samples will be put.
            ragged: per family ("ids", "text") the length of each of these rows.
            gradients: False for samples of which no gradients are stored.

        Raises:
            StoreFullError: the disk cannot hold it; nothing is left behind.
            StoreError: the task was not declared by this writer.
            ValueError: a row is no row of the task, or committed or opened already.
        """
        self._journal.check_usable()
        keys = self._keys_of(task)
        wanted = tuple(int(row) for row in rows)
        self._segments = [segment for segment in self._segments if segment.is_open]
        taken = self.committed_rows(task).union(*(s.rows for s in self._segments if s.task == task))
        if not wanted or len(set(wanted)) != len(wanted) or not taken.isdisjoint(wanted):
            raise ValueError(f"rows of {task!r} are empty, repeated, or committed already")
        if min(wanted) < 0 or max(wanted) >= len(keys):
            raise ValueError(f"task {task!r} has rows 0..{len(keys) - 1}, got {min(wanted)}..{max(wanted)}")
        chosen = self._gradients if gradients else None
        plan = SegmentPlan.build(self.header, len(wanted), ragged or {}, chosen)
        segment = SegmentWriter(
            task,
            wanted,
            plan,
            lambda p: self._new_shard("segment", list(p.specs.values()), task),
            self._commit_segment,
        )
        self._segments.append(segment)
        return segment

    def _commit_segment(self, segment: SegmentWriter, shard: ShardFile, n: int) -> None:
        rows, keys = segment.rows[:n], self._keys_of(segment.task)
        self._commit(shard, lambda s: SegmentRecord(segment.task, rows, tuple(keys[row] for row in rows), s))

    def snapshot(self, task: str, batches: Iterable[int], count: int, arrays: Arrays) -> None:
        """Commit the state of the aggregate of a task; it replaces this rank's former one.

        Args:
            task: declared before.
            batches: numbers of the batches that the state covers.
            count: number of samples in them.
            arrays: by name; ``/`` in a name makes groups in the file.

        Raises:
            StoreFullError: the disk cannot hold it beside the former one, which stays.
        """
        self._keys_of(task)
        former = self._ledger.snapshots.get(task)
        covered = tuple(int(batch) for batch in batches)
        shard = write_arrays(arrays, lambda specs: self._new_shard("snapshot", specs, task))
        self._commit(shard, lambda s: SnapshotRecord(task, covered, int(count), s))
        if former is not None:
            disk.unlink_quietly(self.path / SHARD_DIRECTORY / former.shard.file)

    def load_snapshot(self, task: str) -> Snapshot | None:
        """The last committed snapshot of this rank, or None.

        Raises:
            CorruptStoreError: its shard is missing or damaged.
        """
        record = self._ledger.snapshots.get(task)
        return None if record is None else read_snapshot(self.path, record)

    def constants(self, arrays: Arrays) -> None:
        """Commit arrays that hold for the whole store. The first call counts; later ones do nothing."""
        if any(ledger.constants for ledger in (self._ledger, *self._others)):
            return
        self._commit(
            write_arrays(arrays, lambda specs: self._new_shard("constants", specs, "")), ConstantsRecord
        )

    def complete(self, task: str) -> None:
        """Commit that this rank's share of a task is done, aggregates included.

        A reader calls the task complete once every row is there and every rank has said so.
        """
        self._keys_of(task)
        if task not in self._ledger.complete:
            self._append(CompleteRecord(task))

    def is_complete(self, task: str) -> bool:
        """Whether :meth:`complete` was committed for this task by this rank."""
        return task in self._ledger.complete

    def close(self) -> None:
        """Give up open segments and the lock; a second call does nothing."""
        for segment in self._segments:
            segment.abort()
        self._segments = []
        try:
            if self.durability == "process" and self._unsynced:
                for path in self._unsynced:
                    if path.exists():
                        disk.sync_path(path)
                disk.sync_path(self.path / SHARD_DIRECTORY)
                self._journal.sync()
                self._unsynced = []
        finally:
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{t.name} {len(self.committed_rows(t.name))}/{t.n}" for t in self._ledger.tasks.values()
        )
        return f"<StoreWriter {str(self.path)!r} rank {self.rank}: {counts or 'no tasks'}>"

    def _keys_of(self, task: str) -> tuple[str, ...]:
        if task not in self._keys:
            raise StoreError(
                f"task {task!r} was not declared to this writer: call declare_task with its keys first"
            )
        return self._keys[task]

    def _new_shard(self, kind: str, specs: Sequence[DatasetSpec], task: str) -> ShardFile:
        self._journal.check_usable()
        attributes: dict[str, bytes | int] = {
            "format": b"fisherscope-shard",
            "format_version": FORMAT_VERSION,
            "kind": kind.encode(),
            "rank": self.rank,
        }
        if task:
            attributes["task"] = task.encode()
        name = f"{lifecycle.tmp_prefix(self.rank)}{self._created:06d}"
        self._created += 1
        return ShardFile(self.path / SHARD_DIRECTORY / name, specs, attributes, self.durability)

    def _commit(self, shard: ShardFile, make: Callable[[ShardRecord], Record]) -> None:
        """Publish a shard and commit it by its line in the journal."""
        sequence = self._journal.length
        final = self.path / SHARD_DIRECTORY / shard_name(self.rank, sequence)
        try:
            self._journal.check_usable()
            self._append(make(shard.publish(final)))
        except BaseException:
            if self._journal.uncertain or self._journal.length > sequence:
                shard.release()  # the line is on the disk or may be: opening the store again will tell
            else:
                shard.discard()
            raise
        self._unsynced.append(final)
        self._bytes += shard.size

    def _append(self, record: Record) -> None:
        line = encode(record)
        # no line that a reader would refuse must ever reach the journal
        self._ledger.check(decode(line, self.rank, self._journal.length))
        self._journal.append(line, lambda: self._ledger.apply(record))
