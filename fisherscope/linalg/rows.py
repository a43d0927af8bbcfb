"""Per-sample gradients that touch few rows of a large table: those of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.layout import ParameterSlice, Partition
from fisherscope.linalg.gradient import PerSampleGradient, axes_of, largest, tile_bytes
from fisherscope.linalg.running import RunningSum


class Rows(PerSampleGradient):
    """Gradients of a matrix ``[V, E]`` held as the rows that each sample touches, each row once.

    A sample of T tokens touches at most T rows of the V: nothing of size ``[n, V, E]`` is formed unless
    somebody asks for the dense gradients.
    """

    def __init__(self, sample: Tensor, row: Tensor, values: Tensor, n: int, shape: tuple[int, ...]) -> None:
        """Hold unique pairs; use :meth:`of_tokens` to add up what a row is given several times.

        Args:
            sample, row: ``[m]`` int64: which row of which sample's gradient.
            values: ``[m, E]``.
            n: number of samples.
            shape: ``(V, E)``.
        """
        self.sample = sample
        self.row = row
        self.values = values
        self._n = n
        self.shape = shape

    @classmethod
    def of_tokens(cls, ids: Tensor, gradient: Tensor, rows: int) -> Rows:
        """Add up the gradients of equal tokens of a sample.

        Args:
            ids: ``[n, T]`` int64; negative ones are left out.
            gradient: ``[n, T, E]``, with respect to the looked-up rows.
            rows: V.
        """
        n, width = ids.shape[0], gradient.shape[-1]
        kept = (ids >= 0).flatten()
        sample = torch.arange(n, device=ids.device, dtype=torch.int64).repeat_interleave(ids.shape[1])[kept]
        keys, places = torch.unique(sample * rows + ids.flatten()[kept], return_inverse=True)
        values = gradient.new_zeros(len(keys), width, dtype=torch.float32)
        values.index_add_(0, places, gradient.reshape(-1, width)[kept].float())
        return cls(keys // rows, keys % rows, values, n, (rows, width))

    @property
    @override
    def n(self) -> int:
        return self._n

    @property
    @override
    def device(self) -> torch.device:
        return self.values.device

    @override
    def dense(self) -> Tensor:
        out = torch.zeros(self.n, *self.shape, device=self.device, dtype=torch.float32)
        out[self.sample, self.row] = self.values
        return out

    @override
    def scaled(self, factors: Tensor) -> Rows:
        values = self.values * factors[self.sample].unsqueeze(1)
        return Rows(self.sample, self.row, values, self.n, self.shape)

    def joined(self, other: Rows) -> Rows:
        """The sum of both gradients: two uses of one table."""
        rows = self.shape[0]
        keys = torch.cat([self.sample * rows + self.row, other.sample * rows + other.row])
        unique, places = torch.unique(keys, return_inverse=True)
        values = self.values.new_zeros(len(unique), self.shape[1])
        values.index_add_(0, places, torch.cat([self.values, other.values]))
        return Rows(unique // rows, unique % rows, values, self.n, self.shape)

    @override
    def cut(self, piece: ParameterSlice) -> Rows:
        if piece.shape != self.shape:
            raise ValueError(
                f"cannot cut {piece.parameter!r} of shape {piece.shape} from gradients of shape {self.shape}"
            )
        sample, row, values = self.sample, self.row, self.values
        rows, width = self.shape
        for c in piece.cuts:
            if c.axis == 0:
                inside = (row >= c.start) & (row < c.stop) & ((row - c.start) % c.step == 0)
                sample, row, values = sample[inside], (row[inside] - c.start) // c.step, values[inside]
                rows = c.length
            else:
                values = values[:, c.start : c.stop : c.step]
                width = c.length
        return Rows(sample, row, values, self.n, (rows, width))

    @override
    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        rows, width = self.shape
        height = min(rows, max(1, tile_bytes(self.device) // max(1, 4 * width * self.n)))
        for top in range(0, rows, height):
            span = slice(top, min(top + height, rows))
            inside = (self.row >= span.start) & (self.row < span.stop)
            tile = torch.zeros(self.n, span.stop - span.start, width, device=self.device, dtype=torch.float32)
            tile[self.sample[inside], self.row[inside] - top] = self.values[inside]
            yield slice(0, self.n), span, tile

    @override
    def accumulate(
        self,
        *,
        square: Tensor | RunningSum | None = None,
        total: Tensor | RunningSum | None = None,
        partitions: Sequence[Partition | None] = (),
    ) -> list[Tensor]:
        squares = self.values.square()
        self._add(total, self.values)
        self._add(square, squares)
        return self._sums(squares, partitions)

    def _add(self, into: Tensor | RunningSum | None, values: Tensor) -> None:
        """Add ``values [m, E]`` over the samples; of a running sum those rows only that are touched."""
        if isinstance(into, RunningSum):
            rows, places = torch.unique(self.row, return_inverse=True)
            added = values.new_zeros(len(rows), *values.shape[1:]).index_add_(0, places, values)
            into.add_rows(rows, added)
        elif into is not None:
            into.index_add_(0, self.row, values)

    @override
    def bounds(self) -> Tensor:
        found = torch.zeros(self.n, dtype=torch.float32, device=self.device)
        found.scatter_reduce_(0, self.sample, largest(self.values).float(), "amax")
        return found.cpu().double()

    @override
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        return self._sums(self.values * theta[self.row].to(self.values.dtype), partitions)

    @override
    def contracted(self, vector: Tensor, axis: int) -> Tensor:
        out = torch.zeros(self.n, self.shape[axis], dtype=self.values.dtype, device=self.device)
        if axis == 0:
            out[self.sample, self.row] = self.values @ vector.to(self.values.dtype)
            return out
        weights = vector[self.row].to(self.values.dtype).unsqueeze(1)
        return out.index_add_(0, self.sample, self.values * weights)

    def _sums(self, products: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        """Sums of ``products [m, E]`` per sample over the pieces of partitions."""
        marginals: dict[int, Tensor] = {}
        results = []
        for partition, axis in zip(partitions, axes_of(partitions), strict=True):
            if partition is None:
                whole = torch.zeros(self.n, device=self.device, dtype=torch.float32)
                results.append(whole.index_add_(0, self.sample, products.sum(1)).unsqueeze(1))
                continue
            if axis not in marginals:
                out = torch.zeros(self.n, self.shape[axis], device=self.device, dtype=torch.float32)
                if axis == 0:
                    out[self.sample, self.row] = products.sum(1)
                else:
                    out.index_add_(0, self.sample, products)
                marginals[axis] = out
            results.append(partition.sums(marginals[axis]))
        return results

    @override
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        theirs = self if other is None else other
        if not isinstance(theirs, Rows):
            return theirs.gram(self).T
        out = torch.zeros(self.n, theirs.n, device=self.device, dtype=torch.float32)
        # only rows that both touch count: they are brought side by side, some at a time
        common = torch.unique(self.row)
        common = common[torch.isin(common, theirs.row)]
        step = max(1, tile_bytes(self.device) // max(1, 4 * self.shape[1] * max(self.n, theirs.n)))
        for start in range(0, len(common), step):
            chosen = common[start : start + step]
            out += self._side_by_side(chosen) @ theirs._side_by_side(chosen).T
        return out

    def _side_by_side(self, rows: Tensor) -> Tensor:
        """The given rows (sorted) of every sample, ``[n, rows * E]``."""
        place = torch.searchsorted(rows, self.row).clamp_max(len(rows) - 1)
        found = rows[place] == self.row
        out = torch.zeros(self.n, len(rows), self.shape[1], device=self.device, dtype=torch.float32)
        out[self.sample[found], place[found]] = self.values[found]
        return out.flatten(1)
