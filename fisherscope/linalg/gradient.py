"""The one type that rules return, extensions consume, the store keeps and readers give back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from fisherscope.layout import ParameterSlice, Partition

_TILE_BYTES = {"cpu": 1 << 19}
_DEFAULT_TILE_BYTES = 256 << 20


def tile_bytes(device: torch.device) -> int:
    """Bytes of one tile: a core's cache on a CPU, a good launch size on an accelerator."""
    return _TILE_BYTES.get(device.type, _DEFAULT_TILE_BYTES)


def axes_of(partitions: Sequence[Partition | None]) -> list[int]:
    """The axis along which each partition is reduced; the whole goes with one that is needed anyway."""
    cut = [p.axis for p in partitions if p is not None]
    return [(cut[0] if cut else 0) if p is None else p.axis for p in partitions]


class PerSampleGradient(ABC):
    """The gradients of ``n`` samples for one parameter (or one slice of it), in some representation.

    Attributes:
        shape: shape of the parameter, without the sample axis.
    """

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of samples."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the data is."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients themselves, ``[n, *shape]``, float32."""

    @abstractmethod
    def scaled(self, factors: Tensor) -> Self:
        """Each sample's gradient times its factor ``[n]``; how g_i becomes h_i = g_i / sqrt(T_i)."""

    @abstractmethod
    def cut(self, piece: ParameterSlice) -> PerSampleGradient:
        """The gradients of one slice of the parameter."""

    @abstractmethod
    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """The gradients in pieces that fit a cache: ``(samples, rows, [samples, rows, *shape[1:]])``.

        A tile belongs to the caller until the next one is asked for, and may be changed.
        """

    @abstractmethod
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        """Inner products of each sample's gradient with ``theta``, per piece of each partition.

        Args:
            theta: ``[*shape]``.
            partitions: partitions of this parameter; None stands for the whole parameter as one piece.

        Returns:
            For each partition ``[n, pieces]``.
        """

    @abstractmethod
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        """Inner products ``<g_i, g'_j>``, ``[n, m]``; with itself when ``other`` is None."""

    def square_sum(self) -> Tensor:
        """``sum_i g_i ** 2``, ``[*shape]``."""
        out = torch.zeros(self.shape, device=self.device)
        self.accumulate(square=out)
        return out

    def norms(self, partitions: Sequence[Partition | None]) -> list[Tensor]:
        """``sum g_i ** 2`` over each piece of each partition: for each ``[n, pieces]``."""
        return self.accumulate(partitions=partitions)

    def accumulate(
        self,
        *,
        square: Tensor | None = None,
        total: Tensor | None = None,
        partitions: Sequence[Partition | None] = (),
    ) -> list[Tensor]:
        """One pass over the tiles: squares, sum and norms together, nothing larger than a tile alive.

        Args:
            square: ``[*shape]``; ``sum_i g_i ** 2`` is added to it.
            total: ``[*shape]``; ``sum_i g_i`` is added to it.
            partitions: where to sum squares per sample; None stands for the whole parameter.

        Returns:
            For each partition ``[n, pieces]``.
        """
        along = axes_of(partitions)
        sums = {
            axis: torch.zeros(self.n, self.shape[axis], device=self.device) for axis in sorted(set(along))
        }
        for samples, rows, tile in self.tiles():
            if total is not None:
                _add_over_samples(total[rows], tile)
            if square is None and not partitions:
                continue
            tile.square_()
            if square is not None:
                _add_over_samples(square[rows], tile)
            for axis, out in sums.items():
                _add_marginal(out, samples, rows, tile, axis)
        return [
            sums[axis].sum(1, keepdim=True) if p is None else p.sums(sums[axis])
            for p, axis in zip(partitions, along, strict=True)
        ]


def _add_over_samples(out: Tensor, tile: Tensor) -> None:
    out.add_(tile[0] if tile.shape[0] == 1 else tile.sum(0))


def _add_marginal(out: Tensor, samples: slice, rows: slice, squares: Tensor, axis: int) -> None:
    """Add the squares, summed over all axes but one, to ``out [n, shape[axis]]``."""
    target = out[samples, rows] if axis == 0 else out[samples]
    if squares.dim() == 3 and squares.shape[0] == 1:
        matrix = squares[0] if axis == 0 else squares[0].T
        target[0].add_(matrix @ matrix.new_ones(matrix.shape[1]))  # faster than a reduction on CPUs
    else:
        others = [d for d in range(1, squares.dim()) if d != axis + 1]
        target.add_(squares.sum(others) if others else squares)
