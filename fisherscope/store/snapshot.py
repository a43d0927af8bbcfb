"""Named arrays as one shard, and back: snapshots and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray
from torch import Tensor

from fisherscope.store.dtypes import name_of, to_raw
from fisherscope.store.mapped import MappedShard
from fisherscope.store.names import escape_path, unescape_path
from fisherscope.store.progressions import unpack
from fisherscope.store.records import SnapshotRecord
from fisherscope.store.shard import ShardFile
from fisherscope.store.skeleton import DatasetSpec

Arrays: TypeAlias = Mapping[str, Tensor | NDArray[Any]]


@dataclass(frozen=True)
class Snapshot:
    """The state of an aggregate.

    Attributes:
        batches: numbers of the batches it covers, ascending.
        count: number of samples in them.
        arrays: writable tensors, bit for bit as they were given.
    """

    batches: tuple[int, ...]
    count: int
    arrays: dict[str, Tensor]


def write_arrays(arrays: Arrays, create: Callable[[Sequence[DatasetSpec]], ShardFile]) -> ShardFile:
    """A shard that holds these arrays, written but not published.

    Raises:
        ValueError: an array has a type that the store does not.
        StoreFullError: the disk cannot hold it; nothing is left behind.
    """
    specs = {
        name: DatasetSpec(escape_path(name), tuple(values.shape), name_of(values))
        for name, values in arrays.items()
    }
    shard = create(list(specs.values()))
    try:
        for name, values in arrays.items():
            shard.write(specs[name].name, to_raw(values, specs[name].dtype))
    except BaseException:
        shard.discard()
        raise
    return shard


def read_snapshot(root: Path, record: SnapshotRecord) -> Snapshot:
    """Read a snapshot back.

    Raises:
        CorruptStoreError: its shard is missing or damaged.
    """
    shard = MappedShard(root, record.shard)
    arrays = {unescape_path(d.name): shard.tensor(d.name) for d in record.shard.datasets}
    return Snapshot(tuple(sorted(unpack(record.batches).tolist())), record.count, arrays)
