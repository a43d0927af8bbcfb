"""Per-sample gradients of matrices as products over positions, never larger than they must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.layout import ParameterSlice, Partition
from fisherscope.linalg import cost
from fisherscope.linalg.dense import Dense
from fisherscope.linalg.gradient import PerSampleGradient, tile_bytes


class Factored(PerSampleGradient):
    """Gradients ``g_i = left_i' right_i``: a sum of outer products over positions.

    ``left [n, T, R]`` belongs to axis 0 of the parameter and ``right [n, T, C]`` to axis 1. For
    ``nn.Linear`` left is the output gradient and right the layer's input; for transformers' ``Conv1D``,
    whose weight is transposed, it is the other way round. Nothing else has to know the difference.

    A parameter used several times (tied weights, a module called twice) is the same sum with the
    positions of all uses after one another, so its pieces are added before anything is squared.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """Hold ``left [n, T, R]`` and ``right [n, T, C]``."""
        if left.dim() != 3 or right.dim() != 3 or left.shape[:2] != right.shape[:2]:
            raise ValueError(
                f"expected factors [n, T, R] and [n, T, C], got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        self.left = left
        self.right = right
        self.shape = (left.shape[2], right.shape[2])

    @property
    @override
    def n(self) -> int:
        return self.left.shape[0]

    @property
    def positions(self) -> int:
        """T, the number of outer products per sample."""
        return self.left.shape[1]

    @property
    @override
    def device(self) -> torch.device:
        return self.left.device

    @override
    def dense(self) -> Tensor:
        return torch.bmm(self.left.mT, self.right)

    @override
    def scaled(self, factors: Tensor) -> Factored:
        """Scale the smaller of the two factors."""
        weights = factors.view(-1, 1, 1)
        if self.shape[0] <= self.shape[1]:
            return Factored(self.left * weights, self.right)
        return Factored(self.left, self.right * weights)

    def concatenated(self, other: Factored) -> Factored:
        """The sum of both gradients: two uses of one parameter."""
        return Factored(torch.cat([self.left, other.left], 1), torch.cat([self.right, other.right], 1))

    @override
    def cut(self, piece: ParameterSlice) -> Factored:
        left, right = self.left, self.right
        for c in piece.cuts:
            if c.axis == 0:
                left = left[..., c.start : c.stop : c.step]
            else:
                right = right[..., c.start : c.stop : c.step]
        return Factored(left, right)

    @override
    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        rows_all, columns = self.shape
        budget = tile_bytes(self.device) // 4
        rows = min(rows_all, max(1, budget // columns))
        samples = min(self.n, max(1, budget // (rows * columns)))
        buffer = torch.empty(samples, rows, columns, device=self.device)
        for top in range(0, rows_all, rows):
            span = slice(top, min(top + rows, rows_all))
            for start in range(0, self.n, samples):
                chosen = slice(start, min(start + samples, self.n))
                tile = buffer[: chosen.stop - chosen.start, : span.stop - span.start]
                self._product(chosen, span, tile)
                yield chosen, span, tile

    def _product(self, samples: slice, rows: slice, out: Tensor) -> None:
        left, right = self.left[samples, :, rows], self.right[samples]
        if out.shape[0] == 1:
            torch.mm(left[0].T, right[0], out=out[0])  # no batch overhead: this is the inner loop on CPUs
        elif out.is_contiguous():
            torch.bmm(left.mT, right, out=out)
        else:
            out.copy_(torch.bmm(left.mT, right))

    @override
    def norms(self, partitions: Sequence[Partition | None]) -> list[Tensor]:
        results: list[Tensor | None] = [None] * len(partitions)
        grams: dict[int, Tensor] = {}
        rest = []
        for k, partition in enumerate(partitions):
            if cost.gram_is_cheaper(self.n, self.positions, self.shape, partition):
                results[k] = self._gram_norms(partition, grams)
            else:
                rest.append(k)
        if rest:
            values = self.accumulate(partitions=[partitions[k] for k in rest])
            for k, value in zip(rest, values, strict=True):
                results[k] = value
        return [r for r in results if r is not None]

    def _gram_norms(self, partition: Partition | None, grams: dict[int, Tensor]) -> Tensor:
        """``||g^h||^2 = sum_ts (l_t^h . l_s^h)(r_t . r_s)``: one Gram matrix shared by all pieces."""
        axis = 0 if partition is None else partition.axis
        cut, kept = (self.left, self.right) if axis == 0 else (self.right, self.left)
        if 1 - axis not in grams:
            grams[1 - axis] = torch.bmm(kept, kept.mT)
        shared = grams[1 - axis]
        if partition is None:
            return (shared * torch.bmm(cut, cut.mT)).sum((1, 2)).clamp_min_(0).unsqueeze(1)
        # ||g^h||^2 = sum_tk l_tk (S l)_tk over the columns k of the piece: one product for all pieces
        return partition.sums((cut * torch.bmm(shared, cut)).sum(1)).clamp_min_(0)

    @override
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        theta = theta.to(self.left.dtype)
        marginals: dict[int, Tensor] = {}
        results = []
        for partition in partitions:
            axis = 0 if partition is None else partition.axis
            if axis not in marginals:
                if axis == 0:
                    marginals[0] = torch.linalg.vecdot(self.left, self.right @ theta.T, dim=1)
                else:
                    marginals[1] = torch.linalg.vecdot(self.right, self.left @ theta, dim=1)
            values = marginals[axis]
            results.append(values.sum(1, keepdim=True) if partition is None else partition.sums(values))
        return results

    @override
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        theirs = self if other is None else other
        if isinstance(theirs, Factored) and cost.pair_gram_is_cheaper(
            self.n, theirs.n, self.positions, theirs.positions, self.shape
        ):
            left = torch.einsum("itr,jsr->ijts", self.left, theirs.left)
            right = torch.einsum("itc,jsc->ijts", self.right, theirs.right)
            return (left * right).sum((2, 3))
        return Dense(self.dense()).gram(Dense(theirs.dense()))
