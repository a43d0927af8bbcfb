"""Checking one committed shard against the journal: every byte once, in bounded memory, without libhdf5."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from fisherscope.errors import CorruptStoreError
from fisherscope.store import disk
from fisherscope.store.checksum import BLOCK_BYTES, crc32_hex
from fisherscope.store.schema import SHARD_DIRECTORY
from fisherscope.store.shard_record import DatasetRecord, ShardRecord
from fisherscope.store.verification import Finding

_MOST_HOLES = 64  # bytes of a file per byte on the disk: copies may leave out zeros
_LARGE = 1 << 30
NO_DATASET = "metadata or padding"
_DAMAGED = "the bytes are not those that were committed: restore the shard from a copy"
_OTHER_SUM = (
    "the file is as it was committed, but the checksum that the journal gives for this dataset is another: "
    "restore the journal from a copy"
)


@dataclass
class ShardCheck:
    """What became of one shard.

    Attributes:
        findings: what is wrong with it.
        read: bytes that were read.
        damaged: names of the datasets that cannot be trusted.
        there: whether there is a file of that name.
        whole: whether it is a regular one of the right size.
    """

    findings: list[Finding] = field(default_factory=list)
    read: int = 0
    damaged: set[str] = field(default_factory=set)
    there: bool = True
    whole: bool = False


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file that are read together: a block of a dataset, or a part of what belongs to none."""

    start: int
    stop: int
    dataset: DatasetRecord | None = None
    crc32: str = ""


def check_shard(root: Path, shard: ShardRecord, *, quick: bool, tell: Callable[[int], None]) -> ShardCheck:
    """Check that a shard is a regular file of its size and, unless quick, every byte of it.

    Args:
        root: of the store.
        shard: of the journal.
        quick: leave the contents unread.
        tell: called with the number of bytes that were just dealt with.
    """
    check = ShardCheck()
    file = f"{SHARD_DIRECTORY}/{shard.file}"
    try:
        datasets = shard.datasets
    except CorruptStoreError as error:
        check.findings.append(Finding(file, str(error)))
        datasets = ()
    try:
        fd = disk.open_inside(root, SHARD_DIRECTORY, shard.file)
    except FileNotFoundError:
        check.there = False
        check.findings.append(gone(shard.file))
        return check
    except (CorruptStoreError, OSError) as error:
        check.findings.append(Finding(file, str(error)))
        return check
    try:
        status = os.fstat(fd)
        size, on_disk = status.st_size, 512 * status.st_blocks
        check.whole = size == shard.nbytes
        if not check.whole:
            message = f"it has {size} bytes, {shard.nbytes} were committed: restore it from a copy"
            check.findings.append(Finding(file, message))
        if size > max(_MOST_HOLES * on_disk, _LARGE):
            message = f"of its {size} bytes only {on_disk} are on the disk: restore it from a copy"
            check.findings.append(Finding(file, message))
            check.whole = False
        elif not quick:
            _check_bytes(fd, min(size, shard.nbytes), shard, datasets, check, tell)
    finally:
        os.close(fd)
    return check


def gone(file: str) -> Finding:
    """That a shard is missing."""
    return Finding(f"{SHARD_DIRECTORY}/{file}", "it was committed and is missing: restore it from a copy")


def _check_bytes(
    fd: int,
    size: int,
    shard: ShardRecord,
    datasets: tuple[DatasetRecord, ...],
    check: ShardCheck,
    tell: Callable[[int], None],
) -> None:
    """Read the first ``size`` bytes once, and add what is wrong with them."""
    whole = hashlib.sha256()
    buffer = memoryview(bytearray(min(BLOCK_BYTES, max(size, 1))))
    bad: list[_Piece] = []
    unreadable: dict[int, str] = {}
    filled: list[_Piece] = []
    end_of_metadata = min((d.offset for d in datasets if d.spec.nbytes), default=size)
    for piece in _pieces(datasets, shard.nbytes, size):
        if piece.stop > size:  # the file ends within it
            bad += [piece] if piece.dataset else []
            continue
        chunk = buffer[: piece.stop - piece.start]
        try:
            disk.read_at(fd, chunk, piece.start)
        except OSError as error:
            unreadable[piece.start] = f"it cannot be read ({error.strerror}): restore the shard from a copy"
            bad.append(piece)
            continue
        finally:
            tell(len(chunk))
        check.read += len(chunk)
        whole.update(chunk)
        if piece.dataset is not None and crc32_hex(chunk) != piece.crc32:
            bad.append(piece)
        elif piece.dataset is None and piece.start >= end_of_metadata and any(chunk):
            filled.append(piece)
    differs = whole.hexdigest() != shard.sha256
    if differs and check.whole:
        # padding is zeros; where that is so, what differs lies in the metadata
        suspects = [_Piece(0, end_of_metadata)] if not (bad or filled) else filled
        bad = sorted([*bad, *suspects], key=lambda piece: piece.start)
    for piece in _joined(bad, unreadable):
        name = piece.dataset.name if piece.dataset else NO_DATASET
        message = unreadable.get(piece.start) or (_DAMAGED if differs else _OTHER_SUM)
        found = Finding(f"{SHARD_DIRECTORY}/{shard.file}", message, name, piece.start, piece.stop)
        check.findings.append(found)
        check.damaged.add(name)


def _pieces(datasets: tuple[DatasetRecord, ...], size: int, there: int) -> Iterator[_Piece]:
    """A file of ``size`` bytes in order, cut where blocks begin and end.

    Of what belongs to no dataset only the bytes that are ``there``: the size is anybody's word.
    """
    placed = sorted((d for d in datasets if d.spec.nbytes), key=lambda d: d.offset)
    edges = [0, *(edge for d in placed for edge in (d.offset, d.offset + d.spec.nbytes)), size]
    for number, (start, stop) in enumerate(pairwise(edges)):
        if number % 2 == 0:
            for first in range(start, min(stop, there), BLOCK_BYTES):
                yield _Piece(first, min(first + BLOCK_BYTES, stop))
            continue
        dataset = placed[number // 2]
        for block in range(len(dataset.grid)):
            first, last = dataset.grid.bounds(block)
            yield _Piece(start + first, start + last, dataset, dataset.crc32[8 * block : 8 * block + 8])


def _joined(pieces: list[_Piece], apart: dict[int, str]) -> Iterator[_Piece]:
    """Neighbouring pieces of one dataset as one, but those ``apart``."""
    last: _Piece | None = None
    for piece in pieces:
        adjacent = last is not None and (last.stop, last.dataset) == (piece.start, piece.dataset)
        if last and adjacent and not {last.start, piece.start} & apart.keys():
            last = _Piece(last.start, piece.stop, last.dataset)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last
