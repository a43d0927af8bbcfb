"""Bringing the gradients of some samples into the form in which a segment keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherscope.linalg import LowRank
from fisherscope.linalg.rounding import to_half
from fisherscope.store.dtypes import stored_type
from fisherscope.store.factor_plan import FactoredPlace, LowRankPlace, RowsDataset, scale_name
from fisherscope.store.gradient_plan import BlockDataset, GradientPlan, Place, WholeDataset
from fisherscope.store.plan import SegmentPlan

Put = Callable[[str, int, Any], None]


class GradientWriter:
    """Rounds, cuts and scales gradients, and puts them into the datasets of one segment.

    Attributes:
        waiting: parts of a block whose other parts have not come yet, by dataset, first row and rows.
    """

    def __init__(self, plan: SegmentPlan, put: Put) -> None:
        """Write by calling ``put(dataset, start_row, array)``."""
        self._plan = plan
        self._put = put
        self.waiting: dict[tuple[str, int, int], tuple[Tensor, set[str]]] = {}

    def place(self, parameter: str) -> Place:
        """Where the gradients of a parameter lie.

        Raises:
            KeyError: they are not stored here.
        """
        plan: GradientPlan | None = self._plan.gradients
        if plan is None or parameter not in plan.places:
            raise KeyError(f"the segment stores no gradients of {parameter!r}")
        return plan.places[parameter]

    def put_dense(self, parameter: str, start: int, gradients: Tensor) -> None:
        """Write ``[b, *shape]`` of a parameter whose gradients are kept as they are.

        Raises:
            KeyError: they are not stored here, or in another encoding.
            ValueError: the tensor does not fit.
        """
        place = self.place(parameter)
        if isinstance(place, FactoredPlace | LowRankPlace):
            raise KeyError(f"the gradients of {parameter!r} are not stored as they are: put their factors")
        shape = self._plan.header.layout.parameter(parameter).shape
        b = len(gradients) if gradients.dim() else 0
        if tuple(gradients.shape) != (b, *shape) or not 0 <= start <= self._plan.n - b:
            raise ValueError(
                f"{parameter!r} has shape {shape}, the segment {self._plan.n} rows: cannot put a tensor "
                f"of shape {tuple(gradients.shape)} at row {start}"
            )
        dtype = self._plan.header.gradient_dtype
        if isinstance(place, WholeDataset):
            self._put_scaled(place.name, start, gradients, dtype, place.row_axes)
            return
        # rounding first halves what is cut and moved; a scale has to see the whole row before it
        rounded = (
            gradients.detach() if dtype == "float16" else gradients.detach().to(stored_type(dtype).torch)
        )
        for dataset, piece in place:
            cut = piece.partition.gather(rounded)
            self._put_part(dataset, piece.part, slice(piece.start, piece.stop), start, cut)

    def _put_part(self, dataset: BlockDataset, part: str, columns: slice, start: int, values: Tensor) -> None:
        """Write one part of a block; with several parts, once all of these rows are there."""
        dtype = self._plan.header.gradient_dtype
        if len(dataset.pieces) > 1:
            b = values.shape[1]
            key = (dataset.name, start, b)
            if key not in self.waiting:
                whole = torch.empty((dataset.heads, b, dataset.columns), dtype=values.dtype, device="cpu")
                self.waiting[key] = (whole, set())
            whole, there = self.waiting[key]
            whole[..., columns].copy_(values)
            there.add(part)
            if len(there) < len(dataset.pieces):
                return
            del self.waiting[key]
            values = whole
        self._put_scaled(dataset.name, start, values, dtype, 1)

    def lengths(self, parameter: str, start: int, n: int) -> list[int]:
        """How many positions some samples have for a factored parameter."""
        family = self.factored(parameter).input.family
        assert family is not None
        lengths: list[int] = np.diff(self._plan.offsets[family][start : start + n + 1]).tolist()
        return lengths

    def put_input(self, parameter: str, start: int, rows: Tensor) -> None:
        """Write what the layer of a factored parameter was given, once for all parameters that share it.

        Args:
            parameter: any of them.
            start: position in the segment of the first sample.
            rows: ``[positions of these samples, in]``, sample after sample, without padding.

        Raises:
            KeyError: the gradients of the parameter are not stored here as factors.
            ValueError: the rows are not as many as the samples have positions.
        """
        self._put_rows(self.factored(parameter).input, start, rows)

    def put_output(self, parameter: str, start: int, rows: Tensor) -> None:
        """Write the gradient of what the layer of a factored parameter gave.

        Args:
            parameter: the matrix.
            start: position in the segment of the first sample.
            rows: ``[positions of these samples, out]``, sample after sample, without padding.

        Raises:
            KeyError: the gradients of the parameter are not stored here as factors.
            ValueError: the rows are not as many as the samples have positions.
        """
        self._put_rows(self.factored(parameter).output, start, rows)

    def put_low_rank(self, parameter: str, start: int, gradient: LowRank) -> None:
        """Write approximations, already rounded to what the store keeps, and their errors.

        Raises:
            KeyError: the gradients of the parameter are not stored here in low rank.
            ValueError: they do not fit.
        """
        place = self.place(parameter)
        if not isinstance(place, LowRankPlace):
            raise KeyError(f"the gradients of {parameter!r} are not stored in low rank")
        self._put_rows(place.left, start, gradient.left)
        self._put_rows(place.right, start, gradient.right)
        self._put(place.error, start, gradient.error)

    def factored(self, parameter: str) -> FactoredPlace:
        """Where the factors of a parameter lie.

        Raises:
            KeyError: its gradients are not stored here as factors.
        """
        place = self.place(parameter)
        if not isinstance(place, FactoredPlace):
            raise KeyError(f"the gradients of {parameter!r} are not stored as factors")
        return place

    def _put_rows(self, rows: RowsDataset, start: int, values: Tensor) -> None:
        self._put_scaled(rows.name, start, values, self._plan.header.encodings.dtype, 1)

    def _put_scaled(self, name: str, start: int, values: Tensor, dtype: str, row_axes: int) -> None:
        if dtype != "float16":
            self._put(name, start, values)
            return
        half, scales = to_half(values, row_axes)
        self._put(name, start, half)
        self._put(scale_name(name), start, scales.unsqueeze(-1) if name in self._plan.head_major else scales)
