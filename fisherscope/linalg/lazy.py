"""Per-sample gradients that are too large to be held together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.layout import ParameterSlice, Partition
from fisherscope.linalg.dense import Dense
from fisherscope.linalg.gradient import PerSampleGradient


class OneByOne(PerSampleGradient):
    """Gradients that a function forms for one sample at a time, whenever they are asked for."""

    def __init__(
        self, form: Callable[[int], Tensor], n: int, shape: tuple[int, ...], device: torch.device
    ) -> None:
        """Hold the function: ``form(i)`` is the gradient of sample i, ``[*shape]`` float32."""
        self._form = form
        self._n = n
        self._device = device
        self.shape = shape

    @property
    @override
    def n(self) -> int:
        return self._n

    @property
    @override
    def device(self) -> torch.device:
        return self._device

    def _each(self) -> Iterator[Dense]:
        return (Dense(self._form(i).unsqueeze(0)) for i in range(self.n))

    @override
    def dense(self) -> Tensor:
        out = torch.zeros(self.n, *self.shape, device=self.device, dtype=torch.float32)
        for i, gradient in enumerate(self._each()):
            out[i] = gradient.values[0]
        return out

    @override
    def scaled(self, factors: Tensor) -> OneByOne:
        form = self._form
        return OneByOne(lambda i: form(i) * factors[i], self.n, self.shape, self.device)

    @override
    def cut(self, piece: ParameterSlice) -> OneByOne:
        form = self._form
        return OneByOne(lambda i: piece.take(form(i)), self.n, piece.slice_shape, self.device)

    @override
    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for i, gradient in enumerate(self._each()):
            for _, rows, tile in gradient.tiles():
                yield slice(i, i + 1), rows, tile

    @override
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        by_sample = [gradient.dots(theta, partitions) for gradient in self._each()]
        return [torch.cat(found) for found in zip(*by_sample, strict=True)]

    @override
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        theirs = self if other is None else other
        return torch.cat([theirs.gram(gradient).T for gradient in self._each()])
