"""Sums over many batches that lose nothing: a float32 sum, and beside it what rounding took away."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fisherscope.linalg.scaling import exponent_of

_COMPENSATION = torch.bfloat16  # of a rounding error, whose own digits count for little
_PIECE = 1 << 16  # entries at a time: all that is read and written of them stays in a core's cache


class RunningSum:
    """A sum in float32 with a compensation in bfloat16: 6 bytes an entry.

    A batch is added up in float32 by itself, and then added to the sum at once, together with what rounding
    took from the additions before it (Kahan 1965). The error stays that of one batch, however many there are:
    10^5 samples are within 1e-6. To add every sample like this would cost 8 times as much, and a sum in
    float64 5 times.

    Attributes:
        value: ``[*shape]`` float32.
        lost: ``[*shape]`` bfloat16; what is to be added to ``value``.
    """

    def __init__(self, value: Tensor, lost: Tensor | None = None) -> None:
        """Go on with a sum; both tensors are changed in place."""
        self.value = value
        self.lost = torch.zeros_like(value, dtype=_COMPENSATION) if lost is None else lost

    @classmethod
    def zeros(cls, *shape: int, device: torch.device) -> RunningSum:
        """A sum of nothing."""
        return cls(torch.zeros(shape, dtype=torch.float32, device=device))

    def total(self) -> Tensor:
        """The sum, ``[*shape]`` float64 on the CPU."""
        return self.value.cpu().double() + self.lost.cpu().double()

    def largest(self) -> float:
        """The largest absolute value; 0 where there are none."""
        return float(self.value.abs().max()) if self.value.numel() else 0.0

    def clear(self) -> None:
        """Begin again with nothing."""
        self.value.zero_()
        self.lost.zero_()

    def arrays(self, name: str) -> dict[str, Tensor]:
        """What :meth:`load` takes: the live tensors, where they are on the CPU."""
        return {name: self.value.detach().cpu(), f"lost/{name}": self.lost.detach().cpu()}

    def load(self, arrays: Mapping[str, Tensor], name: str, exponent: int | None = None) -> int:
        """Go on with what :meth:`arrays` gave; or with a sum in float64, which may need another scale.

        Args:
            arrays: what is stored, by name.
            name: of the sum.
            exponent: of the power of two by which a sum in float64 is multiplied; by default what squares
                need, an even number.

        Returns:
            That exponent; 0 for a sum that was stored with what it had lost.
        """
        stored = arrays[name]
        if f"lost/{name}" in arrays:
            self.value.copy_(stored)
            self.lost.copy_(arrays[f"lost/{name}"])
            return 0
        total = stored.double()
        if exponent is None:
            exponent = 2 * exponent_of(float(total.abs().max()) ** 0.5 if total.numel() else 0.0)
        total = total * 2.0**exponent
        self.value.copy_(total)
        self.lost.copy_(total - self.value.cpu().double())
        return exponent

    def add(self, values: Tensor) -> None:
        """Add the sum of a batch, ``[*shape]`` float32; ``values`` is used up."""
        _add(self.value, self.lost, values.add_(self.lost))

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        """Add ``values [m, ...]`` to some rows, each at most once; ``values`` is used up."""
        value, lost = self.value[rows], self.lost[rows]
        _add(value, lost, values.add_(lost))
        self.value[rows], self.lost[rows] = value, lost

    def batch(self) -> BatchSum:
        """To add a batch tile by tile: ``with sum.batch() as open: open.rows(rows).add_(tile)``."""
        return BatchSum(self)


class BatchSum:
    """The sum of one batch on its way into a running sum, some rows at a time, which stay in a cache."""

    def __init__(self, into: RunningSum) -> None:
        """Nothing is added before rows are asked for."""
        self._into = into
        self._rows: slice | None = None
        self._buffer = self._open = into.value.new_empty(0)

    def rows(self, rows: slice) -> Tensor:
        """Where to add what belongs to these rows, ``[rows, ...]`` float32; other rows are finished."""
        if self._rows != rows:
            self._finish()
            lost = self._into.lost[rows]
            if lost.numel() > self._buffer.numel():
                self._buffer = lost.new_empty(lost.numel(), dtype=torch.float32)
            # what was lost before is where the batch begins
            self._open = self._buffer[: lost.numel()].view(lost.shape).copy_(lost)
            self._rows = rows
        return self._open

    def _finish(self) -> None:
        if self._rows is not None:
            _add(self._into.value[self._rows], self._into.lost[self._rows], self._open)
        self._rows = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()


class PlainSum:
    """What :class:`BatchSum` is for a running sum, for a tensor that is simply added to."""

    def __init__(self, into: Tensor) -> None:
        """Add to this tensor."""
        self._into = into

    def rows(self, rows: slice) -> Tensor:
        """Where to add what belongs to these rows."""
        return self._into[rows]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Nothing is left to be done."""


def _add(value: Tensor, lost: Tensor, batch: Tensor) -> None:
    """``value += batch``, and ``lost`` becomes what rounding takes away; ``batch`` is used up."""
    if value.device.type != "cpu" or value.numel() <= _PIECE:
        _add_piece(value, lost, batch)
        return
    pieces = (torch.split(tensor.view(-1), _PIECE) for tensor in (value, lost, batch))
    for piece in zip(*pieces, strict=True):
        _add_piece(*piece)


def _add_piece(value: Tensor, lost: Tensor, batch: Tensor) -> None:
    new = value + batch
    value.sub_(new)
    batch.add_(value)
    lost.copy_(batch)
    value.copy_(new)
