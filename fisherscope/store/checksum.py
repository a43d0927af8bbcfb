"""Checksums: crc32 per block of a dataset, sha256 per file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherscope.store import disk

try:
    from isal.isal_zlib import crc32  # the same values as zlib's, ten times as fast
except ImportError:  # stores are checked all the same where only the essential packages are installed
    from zlib import crc32

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class BlockGrid:
    """How the bytes of one dataset are cut into checksummed blocks.

    The dataset is cut into ``spans`` equal parts (the heads of a head-major dataset, else 1) and each
    span into blocks of ``BLOCK_BYTES``, the last one shorter: no block straddles a head.

    Attributes:
        nbytes: bytes of the dataset.
        spans: equal parts that no block straddles.
    """

    nbytes: int
    spans: int = 1

    @property
    def span_bytes(self) -> int:
        """Bytes per span."""
        return self.nbytes // self.spans

    @property
    def per_span(self) -> int:
        """Blocks per span."""
        return -(-self.span_bytes // BLOCK_BYTES)

    def __len__(self) -> int:
        return self.spans * self.per_span

    def bounds(self, block: int) -> tuple[int, int]:
        """First and last byte (exclusive) of a block, from the start of the dataset."""
        span, inner = divmod(block, self.per_span)
        start = span * self.span_bytes + inner * BLOCK_BYTES
        return start, min(start + BLOCK_BYTES, (span + 1) * self.span_bytes)

    def touched(self, ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which blocks hold a byte of some ranges.

        Args:
            ranges: first and last byte (exclusive) of each, from the start of the dataset, ``[k, 2]``.

        Returns:
            ``[blocks]``.
        """
        starts, stops = ranges[ranges[:, 1] > ranges[:, 0]].T
        edges = np.zeros(len(self) + 1, dtype=np.int64)
        np.add.at(edges, self._blocks_of(starts), 1)
        np.add.at(edges, self._blocks_of(stops - 1) + 1, -1)
        covered: NDArray[np.bool_] = np.cumsum(edges[:-1]) > 0
        return covered

    def _blocks_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        spans, inner = np.divmod(places, max(self.span_bytes, 1))
        blocks: NDArray[np.int64] = spans * self.per_span + inner // BLOCK_BYTES
        return blocks


def crc32_hex(data: bytes | memoryview) -> str:
    """CRC-32 (as in zlib, PNG, Ethernet) as 8 lower-case hex digits."""
    return f"{crc32(data):08x}"


def file_sha256(fd: int, size: int) -> str:
    """sha256 of a file's first ``size`` bytes, in hex."""
    whole = hashlib.sha256()
    buffer = memoryview(bytearray(min(BLOCK_BYTES, max(size, 1))))
    for start in range(0, size, BLOCK_BYTES):
        chunk = buffer[: min(BLOCK_BYTES, size - start)]
        disk.read_at(fd, chunk, start)
        whole.update(chunk)
    return whole.hexdigest()


def block_crcs(fd: int, offset: int, grid: BlockGrid) -> str:
    """crc32 of each block of a dataset that begins at ``offset`` of a file, concatenated in hex."""
    buffer = memoryview(bytearray(min(BLOCK_BYTES, max(grid.span_bytes, 1))))
    found = []
    for block in range(len(grid)):
        start, stop = grid.bounds(block)
        chunk = buffer[: stop - start]
        disk.read_at(fd, chunk, offset + start)
        found.append(crc32_hex(chunk))
    return "".join(found)
