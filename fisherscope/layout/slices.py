"""One slice of one parameter, as index data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """A half-open, possibly strided range along one axis of a parameter."""

    axis: int
    start: int
    stop: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.axis < 0 or self.start < 0 or self.stop <= self.start or self.step < 1:
            raise ValueError(f"not a valid cut: {self!r} (need axis >= 0, 0 <= start < stop, step >= 1)")

    @property
    def length(self) -> int:
        """Number of indices that the cut keeps."""
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """The entries of one parameter that belong together, for instance those of one head.

    The same object cuts weights, gradients, Fisher values and masks: whatever ends in the
    parameter's own axes.

    Attributes:
        parameter: name as in ``model.named_parameters()``.
        shape: shape of the whole parameter.
        cuts: at most one cut per axis; axes without a cut are kept whole.
    """

    parameter: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]

    def __post_init__(self) -> None:
        axes = [cut.axis for cut in self.cuts]
        if len(set(axes)) != len(axes):
            raise ValueError(f"two cuts along one axis of {self.parameter!r}: {self.cuts}")
        for cut in self.cuts:
            if cut.axis >= len(self.shape) or cut.stop > self.shape[cut.axis]:
                raise ValueError(f"{cut} does not fit {self.parameter!r} of shape {self.shape}")

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of the slice, in the parameter's own memory order."""
        kept = list(self.shape)
        for cut in self.cuts:
            kept[cut.axis] = cut.length
        return tuple(kept)

    @property
    def size(self) -> int:
        """Number of entries in the slice."""
        return math.prod(self.slice_shape)

    def take(self, tensor: Tensor) -> Tensor:
        """Cut the slice out of a tensor that ends in the parameter's axes.

        Args:
            tensor: ``[..., *shape]``; leading axes (samples, say) are kept.

        Returns:
            A view ``[..., *slice_shape]``: writing to it writes to ``tensor``. Never a copy.

        Raises:
            ValueError: the last axes of ``tensor`` are not the parameter's shape.
        """
        dims = len(self.shape)
        if tuple(tensor.shape[tensor.dim() - dims :]) != self.shape:
            raise ValueError(
                f"cannot cut {self.parameter!r}: expected a tensor that ends in {self.shape}, "
                f"got {tuple(tensor.shape)}"
            )
        index: list[Any] = [slice(None)] * dims
        for cut in self.cuts:
            index[cut.axis] = slice(cut.start, cut.stop, cut.step)
        return tensor[(..., *index)]
