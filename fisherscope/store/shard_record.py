"""What a journal says of one shard: its size and digest, and where each dataset lies in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from fisherscope.errors import CorruptStoreError
from fisherscope.store.checksum import BlockGrid
from fisherscope.store.dtypes import stored_type
from fisherscope.store.fields import integer, integers, matching, typed
from fisherscope.store.journal import canonical
from fisherscope.store.names import is_dataset_name
from fisherscope.store.skeleton import PAGE, DatasetSpec

MAX_BYTES = 1 << 50
_MAX_AXIS = 1 << 40
_MAX_AXES = 8
_HEX = re.compile(r"[0-9a-f]*")


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
    """One committed shard.

    Attributes:
        file: its name.
        nbytes: its size.
        sha256: of the whole file.
        table: the datasets as JSON, parsed when they are first asked for.
    """

    file: str
    nbytes: int
    sha256: str
    table: bytes

    @classmethod
    def of(cls, file: str, nbytes: int, sha256: str, datasets: Iterable[DatasetRecord]) -> ShardRecord:
        """The record of a shard that was just written."""
        return cls(file, nbytes, sha256, canonical([_encode(dataset) for dataset in datasets]))

    def to_json(self) -> dict[str, Any]:
        """The shard without its table."""
        return {"shard": self.file, "bytes": self.nbytes, "sha256": self.sha256}

    @cached_property
    def datasets(self) -> tuple[DatasetRecord, ...]:
        """The datasets: named plainly, on pages inside the shard, none over another.

        Raises:
            CorruptStoreError: the table does not say so.
        """
        try:
            return _decode(self.table, self.nbytes)
        except (ValueError, RecursionError, OverflowError) as error:
            raise CorruptStoreError(
                f"what the journal says of {self.file} cannot be true: {error}. Restore the store from a copy"
            ) from error


def _encode(dataset: DatasetRecord) -> dict[str, Any]:
    return {
        "name": dataset.spec.name,
        "offset": dataset.offset,
        "shape": list(dataset.spec.shape),
        "dtype": dataset.spec.dtype,
        "spans": dataset.spec.spans,
        "crc32": dataset.crc32,
    }


def _decode(table: bytes, nbytes: int) -> tuple[DatasetRecord, ...]:
    entries = json.loads(table)
    if not isinstance(entries, list):
        raise ValueError("its datasets are no list")  # noqa: TRY004 - every damage is one kind of error
    datasets = tuple(_dataset(entry, nbytes) for entry in entries)
    if len({d.name for d in datasets}) != len(datasets):
        raise ValueError("two datasets have the same name")
    placed = sorted((d.offset, d.offset + d.spec.nbytes) for d in datasets if d.spec.nbytes)
    if any(after[0] < before[1] for before, after in pairwise(placed)):
        raise ValueError("datasets overlap")
    return datasets


def _dataset(data: Any, file_bytes: int) -> DatasetRecord:
    if not isinstance(data, dict):
        raise ValueError("a dataset is no object")  # noqa: TRY004
    name = typed(data, "name", str)
    if not is_dataset_name(name):
        raise ValueError(f"{name!r} cannot be the name of a dataset")
    shape = tuple(integers(data, "shape", _MAX_AXIS))
    if len(shape) > _MAX_AXES:
        raise ValueError(f"{name!r} has {len(shape)} axes")
    kind = stored_type(typed(data, "dtype", str))
    nbytes, offset = math.prod(shape) * kind.itemsize, integer(data, "offset", MAX_BYTES)
    if offset % PAGE or (nbytes and not offset) or offset + nbytes > file_bytes:
        raise ValueError(f"{name!r} does not lie on pages inside its shard of {file_bytes} bytes")
    spans = integer(data, "spans", MAX_BYTES)
    if spans != 1 and (not shape or spans != shape[0] or not nbytes):
        raise ValueError(f"{name!r} cannot have {spans} spans")
    crc32 = matching(data, "crc32", _HEX)
    record = DatasetRecord(DatasetSpec(name, shape, kind.name, spans), offset, crc32)
    if len(crc32) != 8 * len(record.grid):
        raise ValueError(f"{name!r} has {len(crc32)} hex digits of crc32 for {len(record.grid)} blocks")
    return record
