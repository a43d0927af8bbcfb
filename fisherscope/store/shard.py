"""One shard being written: allocated, written in pieces, sealed, given its name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fisherscope.store import disk
from fisherscope.store.checksum import BLOCK_BYTES, BlockGrid, block_crcs, file_sha256
from fisherscope.store.disk import Durability
from fisherscope.store.shard_record import DatasetRecord, ShardRecord
from fisherscope.store.skeleton import DatasetSpec, lay_out


class ShardFile:
    """A file under a temporary name, at its full size from the start.

    The commit protocol, of which this class is the first five steps: allocate the whole file, write,
    sync it, rename it, sync the directory; then one line in the journal.

    Attributes:
        path: the temporary name, and after :meth:`publish` the final one.
        size: bytes of the file.
        bytes_written: bytes of data written so far.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[DatasetSpec],
        attributes: Mapping[str, bytes | int],
        durability: Durability,
    ) -> None:
        """Create the file and reserve its bytes.

        Raises:
            StoreFullError: the disk cannot hold it; nothing is left behind.
        """
        skeleton = lay_out(specs, attributes)
        self.path = path
        self.size = skeleton.size
        self.bytes_written = 0
        self._specs = {spec.name: spec for spec in specs}
        self._offsets = skeleton.offsets
        self._durable = durability == "power"
        with disk.full_disk_named(path, self.size):
            self._fd = disk.create(path)
            try:
                disk.allocate(self._fd, self.size)
                disk.write_at(self._fd, skeleton.metadata, 0)
            except BaseException:
                self.discard()
                raise

    def write(self, name: str, raw: NDArray[Any], start: int = 0) -> None:
        """Write an array's bytes, ``start`` bytes into a dataset.

        Raises:
            StoreFullError: no room, on a file system that cannot reserve.
        """
        if start + raw.nbytes > self._specs[name].nbytes:
            raise ValueError(f"{start} + {raw.nbytes} bytes leave {name!r} of {self._specs[name].nbytes}")
        with disk.full_disk_named(self.path, self.size):
            disk.write_at(self._fd, raw.reshape(-1), self._offsets[name] + start)
        self.bytes_written += raw.nbytes

    def copy_from(self, other: ShardFile) -> None:
        """Fill every span of every dataset with the first bytes of the same span of a larger shard."""
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for name, spec in self._specs.items():
            ours, theirs = spec.nbytes // spec.spans, other._specs[name].nbytes // spec.spans
            for span in range(spec.spans):
                for done in range(0, ours, BLOCK_BYTES):
                    chunk = buffer[: min(BLOCK_BYTES, ours - done)]
                    disk.read_at(other._fd, chunk, other._offsets[name] + span * theirs + done)
                    with disk.full_disk_named(self.path, self.size):
                        disk.write_at(self._fd, chunk, self._offsets[name] + span * ours + done)

    def publish(self, final: Path) -> ShardRecord:
        """Seal the file and give it its final name.

        Returns:
            What the journal has to hold about it. It is not committed before the journal does.

        Raises:
            OSError: it could not be read back, synced or renamed.
        """
        # the medium is waited for while one thread computes each kind of checksum
        with ThreadPoolExecutor(2, "fisherscope-digest") as pool:
            sha256 = pool.submit(file_sha256, self._fd, self.size)
            datasets = pool.submit(self._datasets)
            if self._durable:
                disk.sync(self._fd)
        record = ShardRecord.of(final.name, self.size, sha256.result(), datasets.result())
        self.release()
        disk.rename(self.path, final)
        self.path = final
        if self._durable:
            disk.sync_path(final.parent)
        return record

    def _datasets(self) -> list[DatasetRecord]:
        places = [(spec, self._offsets[spec.name]) for spec in self._specs.values()]
        return [
            DatasetRecord(spec, offset, block_crcs(self._fd, offset, BlockGrid(spec.nbytes, spec.spans)))
            for spec, offset in places
        ]

    def discard(self) -> None:
        """Close and remove the file, under whichever name it has."""
        self.release()
        disk.unlink_quietly(self.path)

    def release(self) -> None:
        """Close the file and leave it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
