"""What the journals of a store add up to: tasks, committed rows, what is live of segments and snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fisherscope.errors import CorruptStoreError
from fisherscope.store import journal, progressions
from fisherscope.store.journal import Line
from fisherscope.store.keys import check_keys_file
from fisherscope.store.records import (
    ConstantsRecord,
    EvidenceRecord,
    JournalStart,
    Record,
    SegmentRecord,
    ShareRecord,
    SnapshotRecord,
    TaskRecord,
    decode,
)
from fisherscope.store.schema import JOURNAL_DIRECTORY
from fisherscope.store.shard_record import ShardRecord


@dataclass
class Ledger:
    """The journal of one rank, replayed and checked.

    Attributes:
        rank: whose.
        store_sha256: digest of ``store.json`` that the records must agree with.
        tasks: declared, in order.
        rows: per task the committed rows.
        segments: per task the committed segments by file, less those that others have replaced.
        snapshots: per task the latest snapshot.
        merged: files of other ranks' snapshots that this rank's hold by now.
        constants: arrays for the whole store.
        evidence: what was found out about what is stored, in order.
        world_size: of how many ranks it is one.
        records: number of records applied.
    """

    rank: int
    store_sha256: str
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    rows: dict[str, set[int]] = field(default_factory=dict)
    segments: dict[str, dict[str, SegmentRecord]] = field(default_factory=dict)
    snapshots: dict[str, SnapshotRecord] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)
    constants: ConstantsRecord | None = None
    evidence: list[EvidenceRecord] = field(default_factory=list)
    world_size: int = 1
    records: int = 0

    @classmethod
    def replay(cls, path: Path, rank: int, store_sha256: str, lines: Sequence[Line]) -> Ledger:
        """Apply the lines of a journal.

        Raises:
            CorruptStoreError: a record is not what it may be.
        """
        ledger = cls(rank, store_sha256)
        for number, line in enumerate(lines, 1):
            try:
                ledger.apply(decode(line.record, line.table, rank, number - 1))
            except (ValueError, OverflowError) as error:
                raise CorruptStoreError(
                    f"{path}: line {number} cannot be true: {error}. Restore the store from a copy"
                ) from error
        return ledger

    def check(self, record: Record) -> None:
        """Check that a record may follow those before it.

        Raises:
            ValueError: it contradicts them.
        """
        if isinstance(record, JournalStart) != (self.records == 0):
            raise ValueError("a journal starts with its one record of kind 'journal'")
        match record:
            case JournalStart(rank, sha256):
                if rank != self.rank:
                    raise ValueError(f"it is the journal of rank {rank}")
                if sha256 != self.store_sha256:
                    raise ValueError("store.json is not the one that the journal was started with")
            case TaskRecord(name):
                known = self.tasks.get(name)
                if known is not None and (known == record or not record.extends(known)):
                    raise ValueError(f"task {name!r} is declared twice")
            case SegmentRecord(task):
                self._check_task(task)
                self._check_segment(record)
            case SnapshotRecord(task, batches, count):
                self._check_task(task)
                if not progressions.size(batches) <= count <= self.tasks[task].n:
                    raise ValueError(f"a snapshot covers more of {task!r} than there is")
            case ConstantsRecord():
                if self.constants is not None:
                    raise ValueError("constants are committed twice")

    def apply(self, record: Record) -> None:
        """Add one record.

        Raises:
            ValueError: it contradicts those before it.
        """
        self.check(record)
        match record:
            case ShareRecord(world_size):
                self.world_size = world_size
            case TaskRecord(name):
                self.tasks[name] = record
                self.rows.setdefault(name, set())
                self.segments.setdefault(name, {})
            case SegmentRecord(task, rows):
                for file in record.replaces:
                    del self.segments[task][file]
                self.rows[task].update(rows)
                self.segments[task][record.shard.file] = record
            case SnapshotRecord(task):
                self.snapshots[task] = record
                self.merged.update(record.merges)
            case ConstantsRecord():
                self.constants = record
            case EvidenceRecord():
                self.evidence.append(record)
            case JournalStart():
                pass
        self.records += 1

    def _check_task(self, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(f"task {task!r} was not declared")

    def _check_segment(self, record: SegmentRecord) -> None:
        task, rows = record.task, record.rows
        if max(rows) >= self.tasks[task].n:
            raise ValueError(f"rows of {task!r} lie beyond its last")
        if not record.replaces:
            if not self.rows[task].isdisjoint(rows):
                raise ValueError(f"rows of {task!r} are committed twice")
            return
        known = self.segments[task]
        if len(set(record.replaces)) != len(record.replaces) or not known.keys() >= set(record.replaces):
            raise ValueError(f"it replaces segments of {task!r} that are not there")
        if sorted(rows) != sorted(row for file in record.replaces for row in known[file].rows):
            raise ValueError(f"it replaces segments of {task!r} with other rows")

    def shards(self) -> Iterator[ShardRecord]:
        """Every shard that must exist: superseded ones need not."""
        for segments in self.segments.values():
            yield from (segment.shard for segment in segments.values())
        yield from (snapshot.shard for snapshot in self.snapshots.values())
        if self.constants is not None:
            yield self.constants.shard


def read_ledgers(root: Path, store_sha256: str) -> list[Ledger]:
    """The journals of all ranks, in order of rank.

    Raises:
        CorruptStoreError: a journal is damaged, or two journals contradict each other.
    """
    before = journal.sizes(root)
    while True:
        try:
            ledgers = [read_ledger(root, rank, store_sha256) for rank in journal.ranks(root)]
            settle(root, ledgers)
        except CorruptStoreError:
            # one that was read before another was written may contradict it
            before, known = journal.sizes(root), before
            if before == known:
                raise
        else:
            return ledgers


def read_ledger(root: Path, rank: int, store_sha256: str) -> Ledger:
    """The journal of one rank.

    Raises:
        CorruptStoreError: it is damaged.
    """
    path = root / JOURNAL_DIRECTORY / journal.journal_file(rank)
    return Ledger.replay(path, rank, store_sha256, journal.read(root, rank).lines)


def settle(root: Path, ledgers: Sequence[Ledger]) -> None:
    """Check that ranks agree, and drop the snapshots that another rank's hold.

    Ranks agree when they declare the same tasks, some perhaps with fewer samples, and no row and no batch is
    covered by two of them.

    Raises:
        CorruptStoreError: they do not.
    """
    merged = set[str]().union(*(ledger.merged for ledger in ledgers))
    for ledger in ledgers:
        for gone in [task for task, snapshot in ledger.snapshots.items() if snapshot.shard.file in merged]:
            del ledger.snapshots[gone]
    for name in dict.fromkeys(name for ledger in ledgers for name in ledger.tasks):
        mine = [ledger for ledger in ledgers if name in ledger.tasks]
        widest = latest(name, mine)
        if not all(widest.extends(ledger.tasks[name]) for ledger in mine):
            raise CorruptStoreError(f"{root}: the ranks' journals disagree about task {name!r}")
        check_keys_file(root, widest.extents[-1])
        _check_rows(root, name, mine)
        _check_batches(root, name, mine)


def latest(name: str, ledgers: Sequence[Ledger]) -> TaskRecord:
    """A task as the rank declares it that knows of the most samples."""
    return max((ledger.tasks[name] for ledger in ledgers if name in ledger.tasks), key=lambda task: task.n)


def _check_rows(root: Path, task: str, ledgers: Sequence[Ledger]) -> None:
    rows: set[int] = set()
    for ledger in ledgers if len(ledgers) > 1 else ():
        if not rows.isdisjoint(ledger.rows[task]):
            twice = min(rows & ledger.rows[task])
            raise CorruptStoreError(f"{root}: row {twice} of task {task!r} is committed by two ranks")
        rows |= ledger.rows[task]


def _check_batches(root: Path, task: str, ledgers: Sequence[Ledger]) -> None:
    snapshots = [ledger.snapshots[task] for ledger in ledgers if task in ledger.snapshots]
    if sum(s.count for s in snapshots) > sum(len(ledger.rows[task]) for ledger in ledgers):
        raise CorruptStoreError(
            f"{root}: the aggregates of task {task!r} cover more samples than are committed"
        )
    packed = [p for snapshot in snapshots for p in snapshot.batches]
    if len(set(progressions.unpack(packed).tolist())) != progressions.size(packed):
        raise CorruptStoreError(f"{root}: a batch of task {task!r} is in the aggregates twice")
