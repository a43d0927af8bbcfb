"""The one type that rules return, extensions consume, the store keeps and readers give back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Self

import torch
from torch import Tensor

from fisherscope.layout import ParameterSlice, Partition
from fisherscope.linalg.running import BatchSum, PlainSum, RunningSum
from fisherscope.torch_state import in_full_precision

_TILE_BYTES = {"cpu": 2 << 20}
_DEFAULT_TILE_BYTES = 256 << 20
_PRODUCTS = frozenset({"accumulate", "dense", "dots", "gram", "norms"})
_MANY = 6  # from so many samples on one reduction is faster than adding them one by one


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

    def __init_subclass__(cls) -> None:
        """Whoever asks, products are float32: torch can be set to round what it multiplies to bfloat16."""
        super().__init_subclass__()
        for name in _PRODUCTS & vars(cls).keys():
            setattr(cls, name, in_full_precision(vars(cls)[name]))

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

        All samples of some rows come one after the other, as far as they can be had together. A tile belongs
        to the caller until the next one is asked for, and may be changed.
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

    def contracted(self, vector: Tensor, axis: int) -> Tensor:
        """Each sample's gradient, contracted with one vector over every axis but one.

        Args:
            vector: of the shape of the parameter without ``axis``.
            axis: the axis that stays.

        Returns:
            ``[n, shape[axis]]``: for a matrix ``g_i v`` where ``axis`` is 0, and ``v' g_i`` where it is 1.
        """
        out = torch.zeros(self.n, self.shape[axis], dtype=torch.float32, device=self.device)
        for samples, rows, tile in self.tiles():
            if axis == 0:
                out[samples, rows] = (tile * vector).flatten(2).sum(2) if vector.dim() else tile * vector
            else:
                weight = vector[rows].unsqueeze(axis)
                others = [d + 1 for d in range(len(self.shape)) if d != axis]
                out[samples] += (tile * weight).sum(others)
        return out

    @abstractmethod
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        """Inner products ``<g_i, g'_j>``, ``[n, m]``; with itself when ``other`` is None."""

    def bounds(self) -> Tensor:
        """Bounds of each sample's largest absolute entry, ``[n]`` float64 on the CPU.

        Only a gradient of 0 has 0. They may exceed it, but are of its magnitude; a gradient that is not
        finite has no finite bound.
        """
        found = torch.zeros(self.n, dtype=torch.float32, device=self.device)
        for samples, _, tile in self.tiles():
            found[samples] = torch.maximum(found[samples], largest(tile.flatten(1)))
        return found.cpu().double()

    def balanced(self) -> PerSampleGradient:
        """The same gradients, in such a form that no square of what they are made of leaves the range."""
        return self

    def square_sum(self) -> Tensor:
        """``sum_i g_i ** 2``, ``[*shape]``."""
        out = torch.zeros(self.shape, device=self.device, dtype=torch.float32)
        self.accumulate(square=out)
        return out

    def norms(self, partitions: Sequence[Partition | None]) -> list[Tensor]:
        """``sum g_i ** 2`` over each piece of each partition: for each ``[n, pieces]``."""
        return self.accumulate(partitions=partitions)

    def accumulate(
        self,
        *,
        square: Tensor | RunningSum | None = None,
        total: Tensor | RunningSum | None = None,
        partitions: Sequence[Partition | None] = (),
    ) -> list[Tensor]:
        """One pass over the tiles: squares, sum and norms together, nothing larger than a tile alive.

        Args:
            square: ``[*shape]``; ``sum_i g_i ** 2`` is added to it. A running sum gets that of all samples in
                one compensated addition.
            total: ``[*shape]``; ``sum_i g_i`` is added to it, likewise.
            partitions: where to sum squares per sample; None stands for the whole parameter.

        Returns:
            For each partition ``[n, pieces]``.
        """
        along = axes_of(partitions)
        sums = {
            axis: torch.zeros(self.n, self.shape[axis], dtype=torch.float32, device=self.device)
            for axis in set(along)
        }
        with ExitStack() as stack:
            into_square = None if square is None else stack.enter_context(_into(square))
            into_total = None if total is None else stack.enter_context(_into(total))
            for samples, rows, tile in self.tiles():
                if into_total is not None:
                    _add_over_samples(into_total.rows(rows), tile)
                if 0 in sums:
                    sums[0][samples, rows] = _square_norms(tile)
                if sums.keys() <= {0}:
                    if into_square is not None:
                        _add_squares(into_square.rows(rows), tile)
                    continue
                tile.square_()
                if into_square is not None:
                    _add_over_samples(into_square.rows(rows), tile)
                for axis in sums.keys() - {0}:
                    others = [d for d in range(1, tile.dim()) if d != axis + 1]
                    sums[axis][samples] += tile.sum(others)
        return pieces(partitions, along, sums)


def _into(into: Tensor | RunningSum) -> AbstractContextManager[BatchSum | PlainSum]:
    return into.batch() if isinstance(into, RunningSum) else PlainSum(into)


def largest(values: Tensor) -> Tensor:
    """The largest absolute value along the last axis, without a copy; 0 where the axis is empty."""
    if not values.shape[-1]:
        return values.new_zeros(values.shape[:-1])
    return torch.maximum(values.amax(-1), -values.amin(-1))


def pieces(
    partitions: Sequence[Partition | None], along: Sequence[int], marginals: Mapping[int, Tensor]
) -> list[Tensor]:
    """Sums over the pieces of partitions, from the values per index of their axes, ``[n, shape[axis]]``."""
    return [
        marginals[axis].sum(1, keepdim=True) if partition is None else partition.sums(marginals[axis])
        for partition, axis in zip(partitions, along, strict=True)
    ]


def _add_over_samples(out: Tensor, tile: Tensor) -> None:
    if len(tile) >= _MANY or tile.device.type != "cpu":
        out.add_(tile.sum(0))
    else:
        for gradient in tile.unbind():
            out.add_(gradient)


def _add_squares(out: Tensor, tile: Tensor) -> None:
    """Add ``sum_i g_i ** 2``, with one pass over the tile where it is in a cache."""
    if tile.device.type != "cpu":
        out.add_(tile.square_().sum(0))
    else:
        for gradient in tile.unbind():
            out.addcmul_(gradient, gradient)


def _square_norms(tile: Tensor) -> Tensor:
    """Sum of squares of each row of each sample: the tile is read once and left as it is."""
    norms: Tensor = torch.linalg.vector_norm(tile.reshape(*tile.shape[:2], -1), dim=2)
    return norms.square_()
