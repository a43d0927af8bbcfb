"""The records of a journal: what each kind holds, to JSON and back, checked field by field.

A record that passes cannot lead a reader outside the files of the store: names are plain, sizes are
bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from fisherscope.store.fields import bounded, integer, integers, leaves, matching, typed
from fisherscope.store.keys import MAX_ROWS, SHA256, Extent
from fisherscope.store.progressions import Progression
from fisherscope.store.shard_record import MAX_BYTES, ShardRecord

_ABOUT = re.compile(r"[a-z][a-z_]{0,31}")
_SHARD = re.compile(r"r[0-9]{4}-[0-9]{6,}\.h5")


@dataclass(frozen=True)
class JournalStart:
    """The first record of a journal: whose it is."""

    rank: int
    store_sha256: str


@dataclass(frozen=True)
class ShareRecord:
    """From here on the rank is one of so many that share the batches; 1 before any such record."""

    world_size: int


@dataclass(frozen=True)
class TaskRecord:
    """A task was declared, or extended: all extents that it has by now."""

    name: str
    extents: tuple[Extent, ...]

    @property
    def n(self) -> int:
        """Number of its samples."""
        return self.extents[-1].n

    def extends(self, other: TaskRecord) -> bool:
        """Whether this is the other task, or the other task with more samples."""
        return self.name == other.name and self.extents[: len(other.extents)] == other.extents


@dataclass(frozen=True)
class SegmentRecord:
    """Samples of one task were committed; row ``rows[i]`` is the i-th of every dataset.

    Attributes:
        task: whose samples.
        rows: their row numbers.
        shard: where they are.
        replaces: files of this rank's segments that held the very same samples until now.
    """

    task: str
    rows: tuple[int, ...]
    shard: ShardRecord
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class SnapshotRecord:
    """The aggregate of a task over some batches replaces the rank's former one.

    Attributes:
        task: whose aggregate.
        batches: numbers of the batches that it covers.
        count: number of samples in them.
        shard: where it is.
        merges: files of other ranks' snapshots that it holds, too, and replaces.
    """

    task: str
    batches: tuple[Progression, ...]
    count: int
    shard: ShardRecord
    merges: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConstantsRecord:
    """Arrays which hold for the whole store."""

    shard: ShardRecord


@dataclass(frozen=True)
class EvidenceRecord:
    """Something that was found out about what is stored. It is no part of the store's identity.

    Attributes:
        about: what kind of finding it is, such as "proof".
        values: what was found, as JSON data.
    """

    about: str
    values: dict[str, Any]


Record: TypeAlias = (
    JournalStart
    | ShareRecord
    | TaskRecord
    | SegmentRecord
    | SnapshotRecord
    | ConstantsRecord
    | EvidenceRecord
)


def shard_name(rank: int, sequence: int) -> str:
    """File name of the shard that the record of this number commits."""
    return f"r{rank:04d}-{sequence:06d}.h5"


def encode(record: Record) -> tuple[dict[str, Any], bytes]:
    """Plain data for one line of a journal, and the table of the shard's datasets."""
    match record:
        case JournalStart(rank, sha256):
            return {"kind": "journal", "rank": rank, "store_sha256": sha256}, b""
        case ShareRecord(world_size):
            return {"kind": "share", "world_size": world_size}, b""
        case TaskRecord(name, extents):
            return {"kind": "task", "name": name, "extents": [[e.n, e.keys_sha256] for e in extents]}, b""
        case SegmentRecord(task, rows, shard, replaces):
            body = {"task": task, "rows": list(rows)} | ({"replaces": list(replaces)} if replaces else {})
            return {"kind": "segment", **body, **shard.to_json()}, shard.table
        case SnapshotRecord(task, batches, count, shard, merges):
            covered = {"batches": [list(p) for p in batches], "count": count}
            also = {"merges": list(merges)} if merges else {}
            return {"kind": "snapshot", "task": task, **covered, **also, **shard.to_json()}, shard.table
        case ConstantsRecord(shard):
            return {"kind": "constants", **shard.to_json()}, shard.table
        case EvidenceRecord(about, values):
            return {"kind": "evidence", "about": about, "values": values}, b""


def decode(data: dict[str, Any], table: bytes, rank: int, sequence: int) -> Record:
    """Read what :func:`encode` wrote.

    Args:
        data: of the line.
        table: the datasets of its shard, which are read when they are asked for.
        rank, sequence: whose journal this is and the number of the line.

    Raises:
        ValueError: a field is missing, or not what it may be; the message says which.
    """
    kind = data.get("kind")
    decoders: dict[Any, Callable[[], Record]] = {
        "journal": lambda: JournalStart(integer(data, "rank", 9999), matching(data, "store_sha256", SHA256)),
        "share": lambda: ShareRecord(integer(data, "world_size", 10_000)),
        "task": lambda: TaskRecord(task_name(data.get("name")), _extents(data)),
        "segment": lambda: _segment(data, _shard(data, table, rank, sequence)),
        "snapshot": lambda: _snapshot(data, _shard(data, table, rank, sequence)),
        "constants": lambda: ConstantsRecord(_shard(data, table, rank, sequence)),
        "evidence": lambda: EvidenceRecord(matching(data, "about", _ABOUT), _plain(data, "values")),
    }
    if not isinstance(kind, str) or kind not in decoders:
        raise ValueError(f"unknown kind of record {kind!r}")
    return decoders[kind]()


def task_name(name: Any) -> str:
    """Check the name of a task.

    Raises:
        ValueError: empty, too long, or with characters that do not print.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
        raise ValueError(f"a task's name must be 1 to 256 printable characters, not {name!r}")
    return name


def _plain(data: dict[str, Any], key: str) -> dict[str, Any]:
    """JSON data whose texts a terminal may print and whose numbers are numbers."""
    values = typed(data, key, dict)
    for leaf in leaves(values):
        if isinstance(leaf, str) and not leaf.isprintable():
            raise ValueError(f"{key!r} holds a text with characters that do not print")
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"{key!r} holds a number that is not finite")
    return values


def _extents(data: dict[str, Any]) -> tuple[Extent, ...]:
    extents: list[Extent] = []
    for entry in typed(data, "extents", list):
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError("'extents' holds something else than pairs")
        n = bounded(entry[0], "extents", MAX_ROWS)
        if not isinstance(entry[1], str) or not SHA256.fullmatch(entry[1]):
            raise ValueError("'extents' holds something that is no sha256")
        if extents and n <= extents[-1].n:
            raise ValueError("the extents of a task do not grow")
        extents.append(Extent(n, entry[1]))
    if not extents:
        raise ValueError("a task has no extents")
    return tuple(extents)


def _segment(data: dict[str, Any], shard: ShardRecord) -> SegmentRecord:
    rows = tuple(integers(data, "rows", MAX_ROWS))
    if not rows or len(set(rows)) != len(rows):
        raise ValueError("rows are empty or repeated")
    return SegmentRecord(task_name(data.get("task")), rows, shard, _files(data, "replaces"))


def _snapshot(data: dict[str, Any], shard: ShardRecord) -> SnapshotRecord:
    batches = []
    for entry in typed(data, "batches", list):
        if not isinstance(entry, list) or len(entry) != 3:
            raise ValueError("'batches' holds something else than start, count and step")
        start, count, step = (bounded(value, "batches", MAX_ROWS) for value in entry)
        if not count or not step or start + count * step > MAX_ROWS:
            raise ValueError("'batches' holds an impossible progression")
        batches.append((start, count, step))
    count = integer(data, "count", MAX_ROWS)
    return SnapshotRecord(task_name(data.get("task")), tuple(batches), count, shard, _files(data, "merges"))


def _files(data: dict[str, Any], key: str) -> tuple[str, ...]:
    files = data.get(key, [])
    if not isinstance(files, list) or not all(isinstance(f, str) and _SHARD.fullmatch(f) for f in files):
        raise ValueError(f"{key!r} holds something else than names of shards")
    return tuple(files)


def _shard(data: dict[str, Any], table: bytes, rank: int, sequence: int) -> ShardRecord:
    file = typed(data, "shard", str)
    if file != shard_name(rank, sequence):
        raise ValueError(f"record {sequence} of rank {rank} cannot name the shard {file!r}")
    if not table:
        raise ValueError(f"the shard {file!r} has no table of datasets")
    return ShardRecord(file, integer(data, "bytes", MAX_BYTES), matching(data, "sha256", SHA256), table)
