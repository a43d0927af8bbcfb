"""The append-only journal of one rank: a line in it is what commits a shard.

A line is ``crc32 json`` and a newline: the CRC-32 of what follows the blank in 8 hex digits, a blank, the
JSON in one canonical form. Line k holds ``"seq": k``. Behind the JSON of a record with a shard stand a tab
and a second JSON, the table of its datasets: whoever opens a store checks all bytes, but parses a table only
when the shard is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fisherscope.errors import CorruptStoreError, StoreError
from fisherscope.store import disk
from fisherscope.store.checksum import crc32_hex
from fisherscope.store.disk import Durability
from fisherscope.store.schema import JOURNAL_DIRECTORY

MAX_JOURNAL_BYTES = 4 << 30
MAX_LINE_BYTES = 32 << 20
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


def sizes(root: Path) -> dict[int, int]:
    """Bytes of each rank's journal now: whether anything was added."""
    return {rank: (root / JOURNAL_DIRECTORY / journal_file(rank)).lstat().st_size for rank in ranks(root)}


@dataclass(frozen=True)
class Line:
    """One line of a journal.

    Attributes:
        record: what is committed.
        table: the datasets of its shard, as JSON that was not parsed; empty where there is no shard.
    """

    record: dict[str, Any]
    table: bytes = b""


def canonical(data: Any) -> bytes:
    """JSON in its one form: the same data give the same bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode_line(line: Line) -> bytes:
    """The bytes of a line, its newline included."""
    body = canonical(line.record) + (b"\t" + line.table if line.table else b"")
    return crc32_hex(body).encode() + b" " + body + b"\n"


def decode_line(content: bytes) -> Line | None:
    """Read a line without its newline; None if it is not intact."""
    if len(content) < 10 or content[8:9] != b" ":
        return None
    body = content[9:]
    if content[:8] != crc32_hex(body).encode():
        return None
    head, _, table = body.partition(b"\t")
    try:
        record = json.loads(head)
    except (ValueError, RecursionError):
        return None
    return Line(record, table) if isinstance(record, dict) else None


@dataclass(frozen=True)
class Scan:
    """What a journal holds.

    Attributes:
        lines: the intact ones from the start.
        good: bytes of these lines; what follows is the torn end of a commit that did not happen.
    """

    lines: list[Line]
    good: int


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a journal as it is now, newlines included; endless ones come in pieces.

    What a writer adds meanwhile is left out: of a line that is read while it is written, the first half would
    be taken for damage before the others.
    """
    left = file.seek(0, os.SEEK_END)
    file.seek(0)
    while left > 0 and (piece := file.readline(min(MAX_LINE_BYTES, left))):
        left -= len(piece)
        yield piece


def scan(file: BinaryIO, path: Path) -> Scan:
    """Read the intact lines from the start of a journal.

    A damaged or unterminated end is what a crash leaves, and is left out. An intact line *behind* a
    damaged one is not: committed bytes changed, and nothing may be thrown away on their word.

    Raises:
        CorruptStoreError: a committed line is damaged, or lines are missing.
    """
    lines: list[Line] = []
    good = intact = 0
    torn = False
    for piece in pieces(file):
        line = decode_line(piece.removesuffix(b"\n"))
        if torn:
            intact += line is not None
        elif line is None or not piece.endswith(b"\n"):
            torn = True
        elif line.record.get("seq") != len(lines):
            raise CorruptStoreError(
                f"{path}: line {len(lines) + 1} has sequence number {line.record.get('seq')!r}: lines are "
                "missing or repeated. Restore the journal from a copy"
            )
        else:
            lines.append(line)
            good += len(piece)
    if intact:
        raise CorruptStoreError(
            f"{path}: line {len(lines) + 1} is damaged and {intact} intact lines follow it. Restore the "
            f"journal from a copy; cutting it to its first {good} bytes gives up what those lines committed"
        )
    return Scan(lines, good)


def read(root: Path, rank: int) -> Scan:
    """Read a rank's journal without changing it.

    Raises:
        FileNotFoundError: the rank has none.
        CorruptStoreError: a committed line is damaged, or the file is a link or too large.
    """
    path = root / JOURNAL_DIRECTORY / journal_file(rank)
    with os.fdopen(disk.open_inside(root, JOURNAL_DIRECTORY, journal_file(rank)), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JOURNAL_BYTES:
            raise CorruptStoreError(f"{path} has {size} bytes, more than the {MAX_JOURNAL_BYTES} allowed")
        return scan(file, path)


def is_at_work(root: Path, rank: int) -> bool:
    """Whether a process holds the lock of a rank's journal; False where that cannot be known."""
    fd = disk.open_inside(root, JOURNAL_DIRECTORY, journal_file(rank))
    try:
        return disk.is_locked(fd)
    finally:
        os.close(fd)


class Journal:
    """A journal open for appending, under an exclusive lock.

    Attributes:
        path: of the file.
        found: the lines that were there when it was opened.
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
        self._appending: int | None = None  # the thread that adds a line just now
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o644)
        try:
            disk.lock(self._fd, self.path)
            if self._durable:
                disk.sync_path(directory)
            found = read(root, rank)
            self.found = found.lines
            self.length = len(found.lines)
            self._end = found.good
            if os.fstat(self._fd).st_size > self._end:
                self._cut()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, line: Line, then: Callable[[], None]) -> None:
        """Add one line: when this returns, its record is committed.

        Args:
            line: to write, with the sequence number :attr:`length`.
            then: brings what the caller knows up to date; an interrupt before it ends leaves the journal
                unusable rather than the caller wrong about what is committed.

        On an error the journal is as before, or the writer cannot be used any more and opening the store
        again finds out which of the two happened: see :attr:`uncertain`.

        Raises:
            StoreFullError: no room for the line.
            StoreError: an earlier commit failed half-way.
        """
        self.check_usable()
        content = encode_line(line)
        if len(content) > MAX_LINE_BYTES:
            raise StoreError(f"a line of {len(content)} bytes in {self.path}: commit fewer samples at a time")
        self._appending = threading.get_ident()
        self._broken = True  # until the outcome is known
        try:
            self._write(content)
            self._end += len(content)
            self.length += 1
            then()
            self._broken = False
        finally:
            self._appending = None

    def _write(self, content: bytes) -> None:
        try:
            with disk.full_disk_named(self.path, len(content)):
                disk.write_at(self._fd, content, self._end)
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

    @property
    def uncertain(self) -> bool:
        """Whether the last append failed and the line may still be on the disk."""
        return self._broken

    def check_usable(self) -> None:
        """Refuse to go on after a commit whose outcome is unknown.

        One that another thread is making just now is none of these before it has failed.

        Raises:
            StoreError: it is unknown.
        """
        if self._broken and self._appending in {None, threading.get_ident()}:
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
