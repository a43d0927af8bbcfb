"""What every writer of a store does: hold the lock of a rank, publish shards, commit records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fisherscope.errors import StoreLockedError
from fisherscope.store import disk, lifecycle
from fisherscope.store.disk import Durability
from fisherscope.store.journal import Journal, Line, is_at_work
from fisherscope.store.journal import ranks as journal_ranks
from fisherscope.store.keys import remove_unreferenced
from fisherscope.store.ledger import Ledger, read_ledger, settle
from fisherscope.store.records import (
    EvidenceRecord,
    JournalStart,
    Record,
    ShareRecord,
    TaskRecord,
    decode,
    encode,
    shard_name,
)
from fisherscope.store.schema import FORMAT_VERSION, SHARD_DIRECTORY, StoreHeader
from fisherscope.store.shard import ShardFile
from fisherscope.store.shard_record import ShardRecord
from fisherscope.store.skeleton import DatasetSpec


class Commits:
    """One rank's side of a store: its journal, what that adds up to, and the shards on their way into it.

    Attributes:
        path: the store's directory.
        header: what the store is a store of.
        durability: what a commit survives.
        ledger: of this rank, up to date.
        others: ledgers of the other ranks, as of :meth:`refresh`.
        bytes_written: bytes of the shards that this writer has committed.
    """

    def __init__(
        self,
        path: Path,
        header: StoreHeader,
        digest: str,
        journal: Journal,
        ledger: Ledger,
        durability: Durability,
        *,
        is_new: bool,
    ) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.header = header
        self.durability = durability
        self.ledger = ledger
        self.others: list[Ledger] = []
        self.bytes_written = 0
        self._digest = digest
        self._journal = journal
        self._shards = 0
        self._is_new = is_new
        self._unsynced = False

    @classmethod
    def open(
        cls,
        root: Path,
        header: StoreHeader,
        *,
        rank: int,
        durability: Durability,
        resume: bool = True,
        world_size: int | None = None,
    ) -> Commits:
        """Create a store, or take the lock of a rank of one that is there and repair what a crash left.

        Args:
            root: the store's directory.
            header: what the store is a store of.
            rank: to write as.
            durability: what a commit survives.
            resume: False refuses a store that is there.
            world_size: how many ranks share the work; None for a writer that computes nothing.

        Raises:
            ValueError: no such durability or rank.
            StoreExistsError: the directory holds something else, or a store and ``resume`` is False.
            StoreFormatError: it has another format version.
            FingerprintError: it is the store of another run; the message names the keys that differ.
            StoreLockedError: another process writes as this rank, or as one of another number of ranks.
            CorruptStoreError: something that was committed is missing or damaged.
        """
        if durability not in disk.DURABILITIES:
            raise ValueError(f"durability {durability!r} is none of {list(disk.DURABILITIES)}")
        if not 0 <= rank <= 9999:
            raise ValueError(f"rank must be 0 to 9999, not {rank}")
        stored, digest, is_new = lifecycle.create_or_check(root, header, durability, resume=resume)
        journal = Journal(root, rank, durability)
        try:
            ledger = Ledger.replay(journal.path, rank, digest, journal.found)
            journal.found = []
            commits = cls(root, stored, digest, journal, ledger, durability, is_new=is_new)
            commits.refresh()
            lifecycle.check_shards(root, ledger, durability)
            lifecycle.remove_leftovers(root, ledger)
            if durability == "power":
                lifecycle.sync_keys(root, ledger)
            if not ledger.records:
                commits.append(JournalStart(rank, digest))
            if world_size is not None:
                commits.share(world_size)
        except BaseException:
            journal.close()
            raise
        return commits

    @property
    def rank(self) -> int:
        """Whose journal this is."""
        return self.ledger.rank

    @property
    def ledgers(self) -> list[Ledger]:
        """Of all ranks, in order of rank."""
        return sorted((self.ledger, *self.others), key=lambda ledger: ledger.rank)

    def refresh(self) -> None:
        """Look again at what the other ranks have committed.

        Raises:
            CorruptStoreError: a journal is damaged, or ranks contradict each other.
        """
        ranks = [rank for rank in journal_ranks(self.path) if rank != self.rank]
        self.others = [read_ledger(self.path, rank, self._digest) for rank in ranks]
        settle(self.path, self.ledgers)

    def share(self, world_size: int) -> None:
        """Say how many ranks share the work.

        Raises:
            StoreLockedError: a rank of another number of ranks is at work: both would compute the same.
        """
        with disk.locked_directory(self.path):
            self.refresh()
            for other in self.others:
                if other.world_size != world_size and is_at_work(self.path, other.rank):
                    raise StoreLockedError(
                        f"rank {other.rank} of {other.world_size} collects into {self.path}, and this would "
                        f"be rank {self.rank} of {world_size}: both would compute the same samples. Wait "
                        f"until it ends, or start this as another rank of world_size={other.world_size}"
                    )
            if world_size != self.ledger.world_size:
                self.append(ShareRecord(world_size))

    def remove_old_keys(self) -> None:
        """Remove files of keys that no rank's tasks name, under the lock of the directory."""
        tasks = [task for ledger in self.ledgers for task in ledger.tasks.values()]
        remove_unreferenced(self.path, {extent.keys_sha256 for task in tasks for extent in task.extents})

    def remove_if_empty(self) -> None:
        """Take the store away if this began it, nobody has joined and no sample is in it."""
        if self._is_new and not any(self.ledger.segments.values()):
            lifecycle.remove_if_empty(self.path, self.rank)

    def check_usable(self) -> None:
        """Refuse to go on after a commit whose outcome is unknown.

        Raises:
            StoreError: it is unknown.
        """
        self._journal.check_usable()

    def new_shard(self, kind: str, specs: Sequence[DatasetSpec], task: str) -> ShardFile:
        """A shard of this rank under a temporary name, with its bytes reserved.

        Raises:
            StoreFullError: the disk cannot hold it; nothing is left behind.
        """
        self.check_usable()
        attributes: dict[str, bytes | int] = {
            "format": b"fisherscope-shard",
            "format_version": FORMAT_VERSION,
            "kind": kind.encode(),
            "rank": self.rank,
        }
        if task:
            attributes["task"] = task.encode()
        name = f"{lifecycle.tmp_prefix(self.rank)}{self._shards:06d}"
        self._shards += 1
        return ShardFile(self.path / SHARD_DIRECTORY / name, specs, attributes, self.durability)

    def commit(self, shard: ShardFile, make: Callable[[ShardRecord], Record]) -> None:
        """Publish a shard and commit it by its line in the journal.

        Raises:
            StoreFullError: no room for the line; the shard is gone and everything else as before.
            OSError: the medium failed. Where it is not known whether the line is on it, nothing more can be
                committed before the store was opened again.
        """
        sequence = self._journal.length
        final = self.path / SHARD_DIRECTORY / shard_name(self.rank, sequence)
        try:
            self._journal.check_usable()
            self.append(make(shard.publish(final)))
        except BaseException:
            if self._journal.uncertain or self._journal.length > sequence:
                shard.release()  # the line is on the disk or may be: opening the store again will tell
            else:
                shard.discard()
            raise
        self._unsynced = True
        self.bytes_written += shard.size

    def append(self, record: Record) -> None:
        """Commit a record.

        Raises:
            ValueError: it contradicts those before it.
            OSError: as for :meth:`commit`.
        """
        data, table = encode(record)
        line = Line({"seq": self._journal.length, **data}, table)
        # no line that a reader would refuse must ever reach the journal
        checked = decode(line.record, table, self.rank, self._journal.length)
        if not isinstance(checked, (JournalStart, ShareRecord, TaskRecord, EvidenceRecord)):
            _ = checked.shard.datasets
        self.ledger.check(checked)
        self._journal.append(line, lambda: self.ledger.apply(record))

    def remove(self, files: Iterable[str]) -> None:
        """Remove shards that nothing commits any more."""
        for file in files:
            disk.unlink_quietly(self.path / SHARD_DIRECTORY / file)

    def close(self) -> None:
        """Give up the lock; with durability "process" sync everything before. A second call does nothing."""
        try:
            # what an earlier process committed and could not sync any more is synced, too
            if self.durability == "process" and self._unsynced:
                # a killed process needs no sync: it is for what may come after
                with contextlib.suppress(disk.NoSyncError):
                    lifecycle.sync_all(self.path, self.ledger)
                    self._journal.sync()
                self._unsynced = False
        finally:
            self._journal.close()
