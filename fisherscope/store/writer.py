"""Writing a store: one writer per rank, and a commit for every segment, snapshot and declared task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fisherscope.errors import StoreError
from fisherscope.store import disk, lifecycle
from fisherscope.store.commits import Commits
from fisherscope.store.declaring import Declared, declare
from fisherscope.store.disk import Durability
from fisherscope.store.lifecycle import store_path
from fisherscope.store.plan import SegmentPlan
from fisherscope.store.progressions import pack, unpack
from fisherscope.store.records import (
    ConstantsRecord,
    EvidenceRecord,
    SegmentRecord,
    SnapshotRecord,
    TaskRecord,
)
from fisherscope.store.schema import StoreHeader
from fisherscope.store.sealing import Sealer
from fisherscope.store.segment import SegmentWriter
from fisherscope.store.shard import ShardFile
from fisherscope.store.snapshot import Arrays, Snapshot, read_snapshot, write_arrays
from fisherscope.store.token_texts import TOKENS_FILE, write_token_texts


class StoreWriter:
    """The one process that writes as a rank of a store; a context manager.

    Attributes:
        path: the store's directory.
        header: what the store is a store of.
        rank: of this writer.
        durability: "power": a commit survives the loss of power. "process": it survives the death of the
            process, and :meth:`close` makes everything survive the loss of power. "none": nothing is synced.
    """

    def __init__(self, commits: Commits, queue: int) -> None:
        """Use :meth:`open`."""
        self.path = commits.path
        self.header = commits.header
        self.rank = commits.rank
        self.durability = commits.durability
        self._commits = commits
        self._sealer = Sealer(queue)
        self._declared: set[str] = set()
        self._segments: list[SegmentWriter] = []
        self._waiting: list[tuple[str, tuple[int, ...]]] = []

    @classmethod
    def open(
        cls,
        path: str | Path,
        header: StoreHeader,
        *,
        rank: int = 0,
        durability: Durability = "power",
        resume: bool = True,
        world_size: int | None = None,
        queue: int = 0,
    ) -> StoreWriter:
        """Create a store, or go on with one that the same run began.

        What a crash left behind (a torn line, temporary files, shards that were not committed) is removed.

        Args:
            path: the store's directory.
            header: what the store is a store of; :attr:`header` is that of a store which is there.
            rank: of this writer.
            durability: what a commit survives.
            resume: False refuses a store that is there.
            world_size: of how many ranks this is one, which share the work; None to leave that to the caller.
            queue: with 0 a segment is committed when its ``commit()`` returns. Otherwise a thread seals and
                commits, at most so many segments wait for it, and what goes wrong there is raised by the
                next call, by :meth:`flush` and by :meth:`close`.

        Raises:
            StoreExistsError: the directory holds something else, or a store and ``resume`` is False.
            StoreFormatError: it has another format version.
            FingerprintError: it is the store of another run; the message names the keys that differ.
            StoreLockedError: another process writes as this rank, or as one of another number of ranks.
            CorruptStoreError: something that was committed is missing or damaged.
        """
        commits = Commits.open(
            store_path(path), header, rank=rank, durability=durability, resume=resume, world_size=world_size
        )
        return cls(commits, queue)

    @property
    def tasks(self) -> dict[str, TaskRecord]:
        """The tasks that this rank declared, in order."""
        return dict(self._commits.ledger.tasks)

    @property
    def bytes_written(self) -> int:
        """Bytes that this writer has written into shards, those of open segments included."""
        return self._commits.bytes_written + sum(segment.bytes_written for segment in self._segments)

    def declare_task(self, name: str, keys: Sequence[str]) -> Declared:
        """Say which samples a task has.

        A task that the store has may come with more samples, and in another order: samples are known by their
        keys, those which are there keep their rows, and new ones get rows behind them.

        Args:
            name: of the task.
            keys: one per sample, in the order of the data.

        Returns:
            Which sample is which row, and where the task was extended.

        Raises:
            FingerprintError: the store's task of this name has samples that are not among these.
            ValueError: the name or a key cannot be stored, or two samples have the same key.
        """
        self.flush()
        self._commits.check_usable()
        # ranks that declare together agree on the order of the first
        with disk.locked_directory(self.path):
            self._commits.refresh()
            declared = declare(self.path, self.rank, name, keys, self._commits.ledgers, self.durability)
            if self._commits.ledger.tasks.get(name) != declared.task:
                self._commits.append(declared.task)
                self._commits.remove_old_keys()
        self._declared.add(name)
        return declared

    def committed_rows(self, task: str) -> set[int]:
        """Rows whose samples are committed, by this rank or (when the task was declared) by any other."""
        self.flush()
        return set().union(*(ledger.rows.get(task, set()) for ledger in self._commits.ledgers))

    def aggregated_batches(self, task: str) -> set[int]:
        """Batches that the snapshots of any rank cover."""
        self.flush()
        snapshots = [ledger.snapshots[task] for ledger in self._commits.ledgers if task in ledger.snapshots]
        return {int(batch) for snapshot in snapshots for batch in unpack(snapshot.batches)}

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
        self._sealer.check()
        self._commits.check_usable()
        n = self._declared_task(task).n
        wanted = tuple(int(row) for row in rows)
        self._segments = [segment for segment in self._segments if segment.is_open]
        opened = [(s.task, s.rows) for s in self._segments]
        taken = [ledger.rows.get(task, set()) for ledger in self._commits.ledgers]
        taken += [set(rows) for other, rows in (*opened, *self._waiting) if other == task]
        fresh = all(rows.isdisjoint(wanted) for rows in taken)
        if not wanted or len(set(wanted)) != len(wanted) or not fresh:
            raise ValueError(f"rows of {task!r} are empty, repeated, or committed already")
        if min(wanted) < 0 or max(wanted) >= n:
            raise ValueError(f"task {task!r} has rows 0..{n - 1}, got {min(wanted)}..{max(wanted)}")
        plan = SegmentPlan.build(self.header, len(wanted), ragged or {}, gradients=gradients)
        segment = SegmentWriter(
            task,
            wanted,
            plan,
            lambda p: self._commits.new_shard("segment", list(p.specs.values()), task),
            self._commit_segment,
        )
        self._segments.append(segment)
        return segment

    def _commit_segment(self, segment: SegmentWriter, shard: ShardFile, n: int) -> None:
        waiting = (segment.task, segment.rows[:n])

        def seal() -> None:
            try:
                self._commits.commit(shard, lambda s: SegmentRecord(*waiting, s))
            finally:
                self._waiting.remove(waiting)

        self._waiting.append(waiting)
        self._sealer.submit(seal, shard.discard)

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
        self._declared_task(task)
        self.flush()
        former = self._commits.ledger.snapshots.get(task)
        shard = write_arrays(arrays, lambda specs: self._commits.new_shard("snapshot", specs, task))
        self._commits.commit(shard, lambda s: SnapshotRecord(task, pack(batches), int(count), s))
        if former is not None:
            self._commits.remove([former.shard.file])

    def load_snapshot(self, task: str) -> Snapshot | None:
        """The last committed snapshot of this rank, or None.

        Raises:
            CorruptStoreError: its shard is missing or damaged.
        """
        self.flush()
        record = self._commits.ledger.snapshots.get(task)
        return None if record is None else read_snapshot(self.path, record)

    @property
    def has_constants(self) -> bool:
        """Whether arrays that hold for the whole store are committed."""
        self.flush()
        return any(ledger.constants for ledger in self._commits.ledgers)

    def constants(self, arrays: Arrays) -> None:
        """Commit arrays that hold for the whole store. The first call counts; later ones do nothing."""
        if self.has_constants:
            return
        self._commits.commit(
            write_arrays(arrays, lambda specs: self._commits.new_shard("constants", specs, "")),
            ConstantsRecord,
        )

    def evidence(self, about: str, values: Mapping[str, Any]) -> None:
        """Commit something that was found out about what is stored; it is no part of the store's identity.

        Args:
            about: what kind of finding it is: lower-case letters and underscores.
            values: what was found, as JSON data.

        Raises:
            ValueError: it is no JSON data, or holds a number that is not finite.
        """
        self.flush()
        self._commits.append(EvidenceRecord(about, dict(values)))

    def token_texts(self, texts: Mapping[int, str]) -> None:
        """Keep how tokens read, beside those that are kept already. Rank 0 does it for all.

        Args:
            texts: by token id.

        Raises:
            ValueError: a text is no short text without control characters.
            StoreFullError: the disk cannot hold it; what was kept stays.
        """
        if self.rank == 0:
            tmp = f"{lifecycle.tmp_prefix(self.rank)}{TOKENS_FILE}"
            write_token_texts(self.path, texts, self.durability, tmp)

    def flush(self) -> None:
        """Wait until everything that was handed over is committed.

        Raises:
            StoreError, OSError: what went wrong with it.
        """
        self._sealer.wait()

    def remove_if_empty(self) -> None:
        """Take the store away if this writer began it, nobody has joined, and no sample is in it."""
        with contextlib.suppress(Exception):
            self.flush()
        self._commits.remove_if_empty()

    def close(self) -> None:
        """Commit what was handed over, give up open segments and the lock; a second call does nothing.

        Raises:
            StoreError, OSError: what went wrong with a segment that was handed over.
        """
        for segment in self._segments:
            segment.abort()
        self._segments = []
        try:
            self._sealer.close()
        finally:
            self._commits.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{t.name} {len(self._commits.ledger.rows[t.name])}/{t.n}" for t in self.tasks.values()
        )
        return f"<StoreWriter {str(self.path)!r} rank {self.rank}: {counts or 'no tasks'}>"

    def _declared_task(self, task: str) -> TaskRecord:
        if task not in self._declared:
            raise StoreError(
                f"task {task!r} was not declared to this writer: call declare_task with its keys first"
            )
        return self._commits.ledger.tasks[task]
