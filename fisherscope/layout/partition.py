"""Equal pieces of one parameter along one axis: one piece per head or per channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from fisherscope.layout.slices import Cut, ParameterSlice


@dataclass(frozen=True)
class Partition:
    """Pieces of equal width along one axis of one parameter, in order of head or channel.

    Fused projections are described by the same data as separate ones: the key heads of a GPT-2
    ``c_attn`` are pieces that start in the middle of the axis. A partition need not cover the axis.

    Attributes:
        parameter: name as in ``model.named_parameters()``.
        shape: shape of the whole parameter.
        axis: the axis that is cut.
        starts: first index of each piece.
        width: indices per piece.
    """

    parameter: str
    shape: tuple[int, ...]
    axis: int
    starts: tuple[int, ...]
    width: int

    def __post_init__(self) -> None:
        if not 0 <= self.axis < len(self.shape):
            raise ValueError(f"axis {self.axis} does not exist in {self.parameter!r} of shape {self.shape}")
        if not self.starts or self.width < 1:
            raise ValueError(f"a partition of {self.parameter!r} needs at least one piece of width >= 1")
        ordered = sorted(self.starts)
        if ordered[0] < 0 or ordered[-1] + self.width > self.shape[self.axis]:
            raise ValueError(
                f"pieces of {self.parameter!r} leave axis {self.axis} of length {self.shape[self.axis]}: "
                f"starts {ordered[0]}..{ordered[-1]}, width {self.width}"
            )
        if any(b - a < self.width for a, b in pairwise(ordered)):
            raise ValueError(f"pieces of {self.parameter!r} overlap along axis {self.axis}")

    @classmethod
    def regular(
        cls, parameter: str, shape: tuple[int, ...], axis: int, count: int, width: int, *, offset: int = 0
    ) -> Partition:
        """``count`` adjacent pieces that start at ``offset``."""
        starts = tuple(range(offset, offset + count * width, width))
        return cls(parameter, shape, axis, starts, width)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, piece: int) -> ParameterSlice:
        if not 0 <= piece < len(self.starts):
            raise IndexError(f"{self.parameter!r} has {len(self.starts)} pieces, asked for {piece}")
        start = self.starts[piece]
        return ParameterSlice(self.parameter, self.shape, (Cut(self.axis, start, start + self.width),))

    def __iter__(self) -> Iterator[ParameterSlice]:
        return (self[piece] for piece in range(len(self)))

    @property
    def module(self) -> str:
        """Path of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of one piece."""
        return tuple(self.width if axis == self.axis else n for axis, n in enumerate(self.shape))

    @property
    def slice_size(self) -> int:
        """Entries in one piece."""
        size = 1
        for n in self.slice_shape:
            size *= n
        return size

    @cached_property
    def _span(self) -> tuple[int, int] | None:
        """First and last index when the pieces are adjacent and in order, else None."""
        expected = range(self.starts[0], self.starts[0] + len(self) * self.width, self.width)
        return (expected.start, expected.stop) if tuple(expected) == self.starts else None

    @cached_property
    def _index(self) -> Tensor:
        """Positions along the axis, ``[pieces * width]``."""
        return (
            torch.tensor(self.starts, dtype=torch.int64, device="cpu")[:, None]
            + torch.arange(self.width, dtype=torch.int64, device="cpu")
        ).reshape(-1)

    def _select(self, tensor: Tensor, dim: int) -> Tensor:
        """The partition's part of axis ``dim`` in order of pieces, ``pieces * width`` long."""
        if self._span is not None:
            start, stop = self._span
            return tensor.narrow(dim, start, stop - start)
        return tensor.index_select(dim, self._index.to(tensor.device))

    def sums(self, values: Tensor) -> Tensor:
        """Sum values given per index of the axis over each piece.

        Args:
            values: ``[..., shape[axis]]``.

        Returns:
            ``[..., pieces]``.
        """
        chosen = self._select(values, values.dim() - 1)
        return torch.unflatten(chosen, -1, (len(self), self.width)).sum(-1)

    def gather(self, tensor: Tensor) -> Tensor:
        """Collect the pieces of each sample with the piece as leading axis.

        Args:
            tensor: ``[n, *shape]``.

        Returns:
            ``[pieces, n, slice_size]``, each piece flattened in the parameter's memory order.
        """
        dim = self.axis + 1
        pieces = torch.unflatten(self._select(tensor, dim), dim, (len(self), self.width))
        return pieces.movedim(dim, 0).flatten(2)

    def scatter(self, pieces: Tensor, out: Tensor) -> None:
        """Write pieces back to where :meth:`gather` took them from.

        Args:
            pieces: ``[pieces, n, slice_size]``.
            out: ``[n, *shape]``, changed in place at the partition's indices only.
        """
        dim = self.axis + 1
        blocks = torch.unflatten(pieces, 2, self.slice_shape).movedim(0, dim).flatten(dim, dim + 1)
        if self._span is not None:
            start, stop = self._span
            out.narrow(dim, start, stop - start).copy_(blocks)
        else:
            out.index_copy_(dim, self._index.to(out.device), blocks.to(out.dtype))
