"""Per-sample gradients of a parameter that is used in several ways: tied embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.layout import ParameterSlice, Partition
from fisherscope.layout.slices import Cut
from fisherscope.linalg.dense import Dense
from fisherscope.linalg.factored import Factored
from fisherscope.linalg.gradient import PerSampleGradient, tile_bytes
from fisherscope.linalg.rows import Rows


class Total(PerSampleGradient):
    """The sum of gradients in different representations, added tile by tile before anything is squared."""

    def __init__(self, *parts: PerSampleGradient) -> None:
        """Add up gradients of the same samples and the same parameter."""
        if len({(part.n, part.shape) for part in parts}) != 1:
            raise ValueError(f"gradients of different size: {[(part.n, part.shape) for part in parts]}")
        self.parts = parts
        self.shape = parts[0].shape

    @property
    @override
    def n(self) -> int:
        return self.parts[0].n

    @property
    @override
    def device(self) -> torch.device:
        return self.parts[0].device

    @override
    def dense(self) -> Tensor:
        out = self.parts[0].dense().clone()  # a dense part gives its own memory
        for part in self.parts[1:]:
            out += part.dense()
        return out

    @override
    def scaled(self, factors: Tensor) -> Total:
        return Total(*(part.scaled(factors) for part in self.parts))

    @override
    def cut(self, piece: ParameterSlice) -> Total:
        return Total(*(part.cut(piece) for part in self.parts))

    @override
    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        rows = self.shape[0]
        row = 4 * self.n
        for size in self.shape[1:]:
            row *= size
        height = min(rows, max(1, tile_bytes(self.device) // max(1, row)))
        for top in range(0, rows, height):
            bottom = min(top + height, rows)
            yield slice(0, self.n), slice(top, bottom), self._rows(top, bottom).dense()

    @override
    def bounds(self) -> Tensor:
        """The sum of the parts' bounds: also where they cancel."""
        return torch.stack([part.bounds() for part in self.parts]).sum(0)

    @override
    def balanced(self) -> Total:
        return Total(*(part.balanced() for part in self.parts))

    def _rows(self, top: int, bottom: int) -> Total:
        return self.cut(ParameterSlice("", self.shape, (Cut(0, top, bottom),)))

    @override
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        by_part = (part.dots(theta, partitions) for part in self.parts)
        return [torch.stack(found).sum(0) for found in zip(*by_part, strict=True)]

    @override
    def contracted(self, vector: Tensor, axis: int) -> Tensor:
        return torch.stack([part.contracted(vector, axis) for part in self.parts]).sum(0)

    @override
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        theirs = self if other is None else other
        out = torch.zeros(self.n, theirs.n, device=self.device, dtype=torch.float32)
        for _, rows, tile in self.tiles():
            piece = ParameterSlice("", self.shape, (Cut(0, rows.start, rows.stop),))
            out += Dense(tile).gram(Dense(theirs.cut(piece).dense()))
        return out


def added(first: PerSampleGradient, second: PerSampleGradient) -> PerSampleGradient:
    """The sum of two gradients of one parameter: two uses of it, added before anything is squared."""
    if isinstance(first, Factored) and isinstance(second, Factored):
        return first.concatenated(second)
    if isinstance(first, Rows) and isinstance(second, Rows):
        return first.joined(second)
    return Total(first, second)
