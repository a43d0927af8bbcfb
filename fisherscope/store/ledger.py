"""What the journals of a store add up to: tasks, committed rows, the live snapshots and constants."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisherscope.errors import CorruptStoreError
from fisherscope.store import journal
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
    sample_key,
)
from fisherscope.store.schema import JOURNAL_DIRECTORY


def keys_digest(keys: Iterable[str]) -> str:
    """sha256 over the keys of a task in row order, each followed by a newline.

    Raises:
        ValueError: a key is no key.
    """
    whole = hashlib.sha256()
    for key in keys:
        whole.update(sample_key(key).encode() + b"\n")
    return whole.hexdigest()


@dataclass
class Ledger:
    """The journal of one rank, replayed and checked.

    Attributes:
        rank: whose.
        store_sha256: digest of ``store.json`` that the records must agree with.
        tasks: declared, in order.
        rows: per task the committed rows.
        segments: per task the committed segments.
        snapshots: per task the latest snapshot.
        constants: arrays for the whole store.
        complete: tasks of which the rank's share is done.
        records: number of records applied.
    """

    rank: int
    store_sha256: str
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    rows: dict[str, set[int]] = field(default_factory=dict)
    segments: dict[str, list[SegmentRecord]] = field(default_factory=dict)
    snapshots: dict[str, SnapshotRecord] = field(default_factory=dict)
    constants: ConstantsRecord | None = None
    complete: set[str] = field(default_factory=set)
    records: int = 0

    @classmethod
    def replay(cls, path: Path, rank: int, store_sha256: str, lines: Sequence[dict[str, Any]]) -> Ledger:
        """Apply the lines of a journal.

        Raises:
            CorruptStoreError: a record is not what it may be.
        """
        ledger = cls(rank, store_sha256)
        for number, line in enumerate(lines, 1):
            try:
                ledger.apply(decode(line, rank, number - 1))
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
                if name in self.tasks:
                    raise ValueError(f"task {name!r} is declared twice")
            case SegmentRecord(task, rows):
                self._check_task(task)
                if max(rows) >= self.tasks[task].n or not self.rows[task].isdisjoint(rows):
                    raise ValueError(f"rows of {task!r} are committed twice, or beyond its last")
            case SnapshotRecord(task) | CompleteRecord(task):
                self._check_task(task)
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
            case TaskRecord(name):
                self.tasks[name] = record
                self.rows[name], self.segments[name] = set(), []
            case SegmentRecord(task, rows):
                self.rows[task].update(rows)
                self.segments[task].append(record)
            case SnapshotRecord(task):
                self.snapshots[task] = record
            case ConstantsRecord():
                self.constants = record
            case CompleteRecord(task):
                self.complete.add(task)
            case JournalStart():
                pass
        self.records += 1

    def _check_task(self, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(f"task {task!r} was not declared")

    def shards(self) -> Iterator[ShardRecord]:
        """Every shard that must exist: superseded snapshots need not."""
        for segments in self.segments.values():
            yield from (segment.shard for segment in segments)
        yield from (snapshot.shard for snapshot in self.snapshots.values())
        if self.constants is not None:
            yield self.constants.shard


def read_ledgers(root: Path, store_sha256: str) -> list[Ledger]:
    """The journals of all ranks, in order of rank.

    Raises:
        CorruptStoreError: a journal is damaged, or two journals contradict each other.
    """
    ledgers = [
        Ledger.replay(
            root / JOURNAL_DIRECTORY / journal.journal_file(rank),
            rank,
            store_sha256,
            journal.read(root, rank).records,
        )
        for rank in journal.ranks(root)
    ]
    check_agreement(root, ledgers)
    return ledgers


def check_agreement(root: Path, ledgers: Sequence[Ledger]) -> None:
    """Check that ranks declare the same tasks and that no row is committed by two of them.

    Raises:
        CorruptStoreError: they do not.
    """
    tasks: dict[str, TaskRecord] = {}
    rows: dict[str, set[int]] = {}
    for ledger in ledgers:
        for name, task in ledger.tasks.items():
            if tasks.setdefault(name, task) != task:
                raise CorruptStoreError(f"{root}: the ranks' journals disagree about task {name!r}")
            if not rows.setdefault(name, set()).isdisjoint(ledger.rows[name]):
                twice = min(rows[name] & ledger.rows[name])
                raise CorruptStoreError(f"{root}: row {twice} of task {name!r} is committed by two ranks")
            rows[name] |= ledger.rows[name]
