"""The append-only journal of one rank: a line in it is what commits a shard.

A line is ``crc32 json`` and a newline: the CRC-32 of the JSON in 8 hex digits, a blank, the JSON in one
canonical form. Line k holds ``"seq": k``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherscope.errors import CorruptStoreError, StoreError
from fisherscope.store import disk
from fisherscope.store.checksum import crc32_hex
from fisherscope.store.disk import Durability
from fisherscope.store.schema import JOURNAL_DIRECTORY

MAX_JOURNAL_BYTES = 4 << 30
_FILE = re.compile(r"r([0-9]{4})\.journal")


def journal_file(rank: int) -> str:
    """File name of a rank's journal."""
    return f"r{rank:04d}.journal"


def ranks(root: Path) -> list[int]:
    """The ranks that have a journal, in order."""
    try:
        names = sorted(os.listdir(root / JOURNAL_DIRECTORY))  # noqa: PTH208
    except FileNotFoundError:
        return []
    return [int(found[1]) for found in map(_FILE.fullmatch, names) if found]


def encode_line(record: dict[str, Any]) -> bytes:
    """One line; the same record gives the same bytes."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    return crc32_hex(body).encode() + b" " + body + b"\n"


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line without its newline; None if the line is not intact."""
    if len(line) < 10 or line[8:9] != b" " or line[:8] != crc32_hex(line[9:]).encode():
        return None
    try:
        record = json.loads(line[9:])
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


@dataclass(frozen=True)
class Scan:
    """What a journal holds.

    Attributes:
        records: of the intact lines from the start.
        good: bytes of these lines; what follows is the torn end of a commit that did not happen.
    """

    records: list[dict[str, Any]]
    good: int


def scan(content: bytes, path: Path) -> Scan:
    """Read the intact lines from the start of a journal.

    A damaged or unterminated end is what a crash leaves, and is left out. An intact line *behind* a
    damaged one is not: committed bytes changed, and nothing may be thrown away on their word.

    Raises:
        CorruptStoreError: a committed line is damaged, or lines are missing.
    """
    records: list[dict[str, Any]] = []
    good = 0
    while (end := content.find(b"\n", good)) >= 0:
        record = decode_line(content[good:end])
        if record is None:
            break
        if record.get("seq") != len(records):
            raise CorruptStoreError(
                f"{path}: line {len(records) + 1} has sequence number {record.get('seq')!r}: lines are "
                "missing or repeated. Restore the journal from a copy"
            )
        records.append(record)
        good = end + 1
    intact = sum(decode_line(line) is not None for line in content[good:].split(b"\n")[1:])
    if intact:
        raise CorruptStoreError(
            f"{path}: line {len(records) + 1} is damaged and {intact} intact lines follow it. Restore the "
            f"journal from a copy; cutting it to its first {good} bytes gives up what those lines committed"
        )
    return Scan(records, good)


def read(root: Path, rank: int) -> Scan:
    """Read a rank's journal without changing it.

    Raises:
        FileNotFoundError: the rank has none.
        CorruptStoreError: a committed line is damaged, or the file is a link or too large.
    """
    content = disk.read_inside(root, JOURNAL_DIRECTORY, journal_file(rank), limit=MAX_JOURNAL_BYTES)
    return scan(content, root / JOURNAL_DIRECTORY / journal_file(rank))


class Journal:
    """A journal open for appending, under an exclusive lock.

    Attributes:
        path: of the file.
        found: the records that were there when it was opened.
        length: number of intact lines, which is the sequence number of the next.
    """

    def __init__(self, root: Path, rank: int, durability: Durability) -> None:
        """Open, lock and repair the journal.

        Raises:
            StoreLockedError: another process writes to it.
            CorruptStoreError: a committed line is damaged.
        """
        directory = root / JOURNAL_DIRECTORY
        self.path = directory / journal_file(rank)
        self._durable = durability == "power"
        self._broken = False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o644)
        try:
            disk.lock(self._fd, self.path)
            if self._durable:
                disk.sync_path(directory)
            found = read(root, rank)
            self.found = found.records
            self.length = len(found.records)
            self._end = found.good
            if os.fstat(self._fd).st_size > self._end:
                self._cut()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: dict[str, Any], then: Callable[[], None]) -> None:
        """Add one line: when this returns, the record is committed.

        Args:
            record: to write.
            then: brings what the caller knows up to date; an interrupt before it ends leaves the journal
                unusable rather than the caller wrong about what is committed.

        On an error the journal is as before, or the writer cannot be used any more and opening the store
        again finds out which of the two happened: see :attr:`uncertain`.

        Raises:
            StoreFullError: no room for the line.
            StoreError: an earlier commit failed half-way.
        """
        self.check_usable()
        line = encode_line({"seq": self.length, **record})
        self._broken = True  # until the outcome is known
        try:
            with disk.full_disk_named(self.path, len(line)):
                disk.write_at(self._fd, line, self._end)
        except BaseException:
            # nothing was synced, so taking the part of the line back is certain if it succeeds
            with contextlib.suppress(OSError):
                self._cut()
                self._broken = False
            raise
        try:
            if self._durable:
                disk.sync(self._fd)
        except BaseException:
            # a failed sync may or may not have reached the disk, and a second one proves nothing
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._end += len(line)
        self.length += 1
        then()
        self._broken = False

    @property
    def uncertain(self) -> bool:
        """Whether the last append failed and the line may still be on the disk."""
        return self._broken

    def check_usable(self) -> None:
        """Refuse to go on after a commit whose outcome is unknown.

        Raises:
            StoreError: it is unknown.
        """
        if self._broken:
            raise StoreError(
                f"an earlier commit to {self.path} failed half-way: close the store and open it again"
            )

    def _cut(self) -> None:
        os.ftruncate(self._fd, self._end)
        if self._durable:
            disk.sync(self._fd)

    def sync(self) -> None:
        """Wait until all lines are on the medium."""
        disk.sync(self._fd)

    def close(self) -> None:
        """Give up the lock; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
