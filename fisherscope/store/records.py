"""The records of a journal: what each kind holds, to JSON and back, checked field by field.

A record that passes cannot lead a reader outside the files of the store: names are plain, sizes are
bounded, datasets lie on pages inside their shard and do not overlap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

from fisherscope.store.checksum import BlockGrid
from fisherscope.store.dtypes import stored_type
from fisherscope.store.names import is_dataset_name
from fisherscope.store.skeleton import PAGE, DatasetSpec

MAX_BYTES = 1 << 50
MAX_ROWS = 1 << 40
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[!-~]{1,128}")
_HEX = re.compile(r"[0-9a-f]*")
_T = TypeVar("_T")


@dataclass(frozen=True)
class DatasetRecord:
    """One dataset of a committed shard: where its bytes are and their checksums."""

    spec: DatasetSpec
    offset: int
    crc32: str

    @property
    def name(self) -> str:
        """Path inside the HDF5 file."""
        return self.spec.name

    @property
    def grid(self) -> BlockGrid:
        """The checksummed blocks."""
        return BlockGrid(self.spec.nbytes, self.spec.spans)


@dataclass(frozen=True)
class ShardRecord:
    """One committed shard."""

    file: str
    nbytes: int
    sha256: str
    datasets: tuple[DatasetRecord, ...]


@dataclass(frozen=True)
class JournalStart:
    """The first record of a journal: whose it is."""

    rank: int
    store_sha256: str


@dataclass(frozen=True)
class TaskRecord:
    """A task was declared: its number of samples and a digest of their keys."""

    name: str
    n: int
    keys_sha256: str


@dataclass(frozen=True)
class SegmentRecord:
    """Samples of one task were committed; row ``rows[i]`` is the i-th of every dataset."""

    task: str
    rows: tuple[int, ...]
    keys: tuple[str, ...]
    shard: ShardRecord


@dataclass(frozen=True)
class SnapshotRecord:
    """The aggregate of a task over ``batches`` (``count`` samples) replaces the rank's former one."""

    task: str
    batches: tuple[int, ...]
    count: int
    shard: ShardRecord


@dataclass(frozen=True)
class ConstantsRecord:
    """Arrays which hold for the whole store."""

    shard: ShardRecord


@dataclass(frozen=True)
class CompleteRecord:
    """The rank's share of a task is done, aggregates included."""

    task: str


Record: TypeAlias = (
    JournalStart | TaskRecord | SegmentRecord | SnapshotRecord | ConstantsRecord | CompleteRecord
)


def shard_name(rank: int, sequence: int) -> str:
    """File name of the shard that the record of this number commits."""
    return f"r{rank:04d}-{sequence:06d}.h5"


def encode(record: Record) -> dict[str, Any]:
    """Plain data for one line of a journal."""
    match record:
        case JournalStart(rank, sha256):
            return {"kind": "journal", "rank": rank, "store_sha256": sha256}
        case TaskRecord(name, n, keys):
            return {"kind": "task", "name": name, "n": n, "keys_sha256": keys}
        case SegmentRecord(task, rows, keys, shard):
            body = {"task": task, "rows": list(rows), "keys": list(keys)}
            return {"kind": "segment", **body, **_encode_shard(shard)}
        case SnapshotRecord(task, batches, count, shard):
            body = {"task": task, "batches": list(batches)}
            return {"kind": "snapshot", **body, "count": count, **_encode_shard(shard)}
        case ConstantsRecord(shard):
            return {"kind": "constants", **_encode_shard(shard)}
        case CompleteRecord(task):
            return {"kind": "complete", "task": task}


def _encode_shard(shard: ShardRecord) -> dict[str, Any]:
    return {
        "shard": shard.file,
        "bytes": shard.nbytes,
        "sha256": shard.sha256,
        "datasets": [
            {
                "name": d.spec.name,
                "offset": d.offset,
                "shape": list(d.spec.shape),
                "dtype": d.spec.dtype,
                "spans": d.spec.spans,
                "crc32": d.crc32,
            }
            for d in shard.datasets
        ],
    }


def decode(data: dict[str, Any], rank: int, sequence: int) -> Record:
    """Read what :func:`encode` wrote.

    Raises:
        ValueError: a field is missing, or not what it may be; the message says which.
    """
    kind = data.get("kind")
    decoders: dict[Any, Callable[[], Record]] = {
        "journal": lambda: JournalStart(_int(data, "rank", 9999), _matching(data, "store_sha256", _SHA256)),
        "task": lambda: TaskRecord(
            task_name(data.get("name")), _int(data, "n", MAX_ROWS), _matching(data, "keys_sha256", _SHA256)
        ),
        "segment": lambda: _segment(data, rank, sequence),
        "snapshot": lambda: SnapshotRecord(
            task_name(data.get("task")),
            tuple(_ints(data, "batches")),
            _int(data, "count", MAX_ROWS),
            _shard(data, rank, sequence),
        ),
        "constants": lambda: ConstantsRecord(_shard(data, rank, sequence)),
        "complete": lambda: CompleteRecord(task_name(data.get("task"))),
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


def sample_key(key: Any) -> str:
    """Check the key of a sample.

    Raises:
        ValueError: not 1 to 128 printable ASCII characters without blanks.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"a sample's key must be 1 to 128 printable ASCII characters, not {key!r}")
    return key


def _segment(data: dict[str, Any], rank: int, sequence: int) -> SegmentRecord:
    rows = tuple(_ints(data, "rows"))
    keys = tuple(sample_key(key) for key in _typed(data, "keys", list))
    if len(rows) != len(keys) or not rows or len(set(rows)) != len(rows):
        raise ValueError("rows are empty, repeated, or not as many as keys")
    return SegmentRecord(task_name(data.get("task")), rows, keys, _shard(data, rank, sequence))


def _shard(data: dict[str, Any], rank: int, sequence: int) -> ShardRecord:
    file = _typed(data, "shard", str)
    if file != shard_name(rank, sequence):
        raise ValueError(f"record {sequence} of rank {rank} cannot name the shard {file!r}")
    nbytes = _int(data, "bytes", MAX_BYTES)
    datasets = tuple(_dataset(d, nbytes) for d in _typed(data, "datasets", list))
    if len({d.name for d in datasets}) != len(datasets):
        raise ValueError("two datasets have the same name")
    placed = sorted((d.offset, d.offset + d.spec.nbytes) for d in datasets if d.spec.nbytes)
    if any(after[0] < before[1] for before, after in pairwise(placed)):
        raise ValueError("datasets overlap")
    return ShardRecord(file, nbytes, _matching(data, "sha256", _SHA256), datasets)


def _dataset(data: Any, file_bytes: int) -> DatasetRecord:
    if not isinstance(data, dict):
        raise ValueError("a dataset is no object")  # noqa: TRY004 - every damage is one kind of error
    name = _typed(data, "name", str)
    if not is_dataset_name(name):
        raise ValueError(f"{name!r} cannot be the name of a dataset")
    shape = tuple(_ints(data, "shape"))
    if len(shape) > 8:
        raise ValueError(f"{name!r} has {len(shape)} axes")
    kind = stored_type(_typed(data, "dtype", str))
    nbytes, offset = math.prod(shape) * kind.itemsize, _int(data, "offset", MAX_BYTES)
    if offset % PAGE or (nbytes and not offset) or offset + nbytes > file_bytes:
        raise ValueError(f"{name!r} does not lie on pages inside its shard of {file_bytes} bytes")
    spans = _int(data, "spans", MAX_BYTES)
    if spans != 1 and (not shape or spans != shape[0] or not nbytes):
        raise ValueError(f"{name!r} cannot have {spans} spans")
    crc32 = _matching(data, "crc32", _HEX)
    record = DatasetRecord(DatasetSpec(name, shape, kind.name, spans), offset, crc32)
    if len(crc32) != 8 * len(record.grid):
        raise ValueError(f"{name!r} has {len(crc32)} hex digits of crc32 for {len(record.grid)} blocks")
    return record


def _typed(data: dict[str, Any], key: str, kind: type[_T]) -> _T:
    value = data.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} is missing or no {kind.__name__}")  # noqa: TRY004
    return value


def _int(data: dict[str, Any], key: str, largest: int) -> int:
    return _bounded(data.get(key), key, largest)


def _ints(data: dict[str, Any], key: str) -> list[int]:
    return [_bounded(value, key, MAX_ROWS) for value in _typed(data, key, list)]


def _bounded(value: Any, key: str, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{key!r} is missing, or not a whole number from 0 to {largest}")
    return value


def _matching(data: dict[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = _typed(data, key, str)
    if not pattern.fullmatch(value):
        raise ValueError(f"{key!r} has the wrong form: {value[:80]!r}")
    return value
