"""Checksums: crc32 per block of a dataset, sha256 per file."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fisherscope.store import disk

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

    def covering(self, start: int, stop: int) -> range:
        """Blocks that hold the bytes ``start`` to ``stop`` of the dataset."""
        if stop <= start:
            return range(0)
        return range(self._block_of(start), self._block_of(stop - 1) + 1)

    def _block_of(self, byte: int) -> int:
        span, inner = divmod(byte, self.span_bytes)
        return span * self.per_span + inner // BLOCK_BYTES


def crc32_hex(data: bytes | memoryview) -> str:
    """CRC-32 (as in zlib, PNG, Ethernet) as 8 lower-case hex digits."""
    return f"{zlib.crc32(data):08x}"


def digest_file(fd: int, size: int, grids: Sequence[tuple[int, BlockGrid]]) -> tuple[str, list[str]]:
    """Read a file once and compute all its checksums.

    Args:
        fd: the file, open for reading.
        size: its bytes.
        grids: offset and grid of each dataset; datasets do not overlap.

    Returns:
        The sha256 of the file in hex, and per dataset the crc32 of its blocks, concatenated in hex.
    """
    whole = hashlib.sha256()
    crcs: list[list[str]] = [[""] * len(grid) for _, grid in grids]
    owner = {
        offset + grid.bounds(block)[0]: (which, block, offset + grid.bounds(block)[1])
        for which, (offset, grid) in enumerate(grids)
        for block in range(len(grid))
    }
    buffer = memoryview(bytearray(min(BLOCK_BYTES, max(size, 1))))
    edges = sorted({0, size, *owner, *(stop for _, _, stop in owner.values())})
    for start, stop in pairwise(edges):
        if start in owner:
            which, block, _ = owner[start]
            chunk = buffer[: stop - start]
            disk.read_at(fd, chunk, start)
            whole.update(chunk)
            crcs[which][block] = crc32_hex(chunk)
            continue
        for position in range(start, stop, BLOCK_BYTES):
            chunk = buffer[: min(BLOCK_BYTES, stop - position)]
            disk.read_at(fd, chunk, position)
            whole.update(chunk)
    return whole.hexdigest(), ["".join(blocks) for blocks in crcs]
