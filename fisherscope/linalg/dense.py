"""Per-sample gradients that are simply there, such as those of biases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.layout import ParameterSlice, Partition
from fisherscope.linalg.gradient import PerSampleGradient, largest, tile_bytes


class Dense(PerSampleGradient):
    """Gradients held as one tensor ``[n, *shape]``."""

    def __init__(self, values: Tensor) -> None:
        """Wrap ``values [n, *shape]``; the parameter has at least one axis."""
        if values.dim() < 2:
            raise ValueError(
                f"expected [n, *shape] with at least one parameter axis, got {tuple(values.shape)}"
            )
        self.values = values
        self.shape = tuple(values.shape[1:])

    @property
    @override
    def n(self) -> int:
        return self.values.shape[0]

    @property
    @override
    def device(self) -> torch.device:
        return self.values.device

    @override
    def dense(self) -> Tensor:
        return self.values.float()

    @override
    def scaled(self, factors: Tensor) -> Dense:
        return Dense(self.values * factors.view(-1, *(1,) * len(self.shape)))

    @override
    def cut(self, piece: ParameterSlice) -> Dense:
        return Dense(piece.take(self.values))

    @override
    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        row = 4 * math.prod(self.shape[1:])
        budget = tile_bytes(self.device)
        most = min(self.shape[0], max(1, budget // row))
        rows = math.ceil(self.shape[0] / math.ceil(self.shape[0] / most))  # tiles of about one height
        samples = max(1, budget // (row * rows))
        for top in range(0, self.shape[0], rows):
            span = slice(top, min(top + rows, self.shape[0]))
            for start in range(0, self.n, samples):
                chosen = slice(start, min(start + samples, self.n))
                yield chosen, span, self.values[chosen, span].to(torch.float32, copy=True)

    @override
    def bounds(self) -> Tensor:
        return largest(self.values.flatten(1)).cpu().double()

    @override
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        product = self.dense() * theta
        results = []
        for partition in partitions:
            if partition is None:
                results.append(product.flatten(1).sum(1, keepdim=True))
            else:
                others = [d for d in range(1, product.dim()) if d != partition.axis + 1]
                results.append(partition.sums(product.sum(others) if others else product))
        return results

    @override
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        mine = self.dense().flatten(1)
        theirs = mine if other is None else other.dense().flatten(1)
        return mine @ theirs.T
