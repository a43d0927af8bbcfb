"""Per-sample gradients of matrices as products over positions, never larger than they must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.layout import ParameterSlice, Partition
from fisherscope.linalg import cost
from fisherscope.linalg.dense import Dense
from fisherscope.linalg.gradient import PerSampleGradient, axes_of, tile_bytes

# below this size the calls cost more than the work, and samples are multiplied several at a time
_SMALL_MATRIX = 1 << 13


class Factored(PerSampleGradient):
    """Gradients ``g_i = left_i' right_i``: a sum of outer products over positions.

    ``left [n, T, R]`` belongs to axis 0 of the parameter and ``right [n, T, C]`` to axis 1. For
    ``nn.Linear`` left is the output gradient and right the layer's input; for transformers' ``Conv1D``,
    whose weight is transposed, it is the other way round. Nothing else has to know the difference.

    A parameter used several times (tied weights, a module called twice) is the same sum with the
    positions of all uses after one another, so its pieces are added before anything is squared.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        *,
        left_image: Tensor | None = None,
        right_image: Tensor | None = None,
    ) -> None:
        """Hold ``left [n, T, R]`` and ``right [n, T, C]``.

        Args:
            left: factor of axis 0.
            right: factor of axis 1.
            left_image: ``left theta``, ``[n, T, C]``, where the pass through the layer has formed it anyway.
            right_image: ``right theta'``, ``[n, T, R]``, likewise. Both spare :meth:`dots` a product.
        """
        if left.dim() != 3 or right.dim() != 3 or left.shape[:2] != right.shape[:2]:
            raise ValueError(
                f"expected factors [n, T, R] and [n, T, C], got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        self.left = left
        self.right = right
        self._left_image = left_image
        self._right_image = right_image
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
        return torch.bmm(self.left.mT, self.right).float()

    @override
    def scaled(self, factors: Tensor) -> Factored:
        """Scale the smaller of the two factors."""
        weights = factors.view(-1, 1, 1)
        if self.shape[0] <= self.shape[1]:
            return Factored((self.left * weights).to(self.left.dtype), self.right)
        return Factored(self.left, (self.right * weights).to(self.right.dtype))

    def concatenated(self, other: Factored) -> Factored:
        """The sum of both gradients: two uses of one parameter."""
        return Factored(
            torch.cat([self.left, other.left], 1),
            torch.cat([self.right, other.right], 1),
            left_image=_joined(self._left_image, other._left_image),
            right_image=_joined(self._right_image, other._right_image),
        )

    @override
    def cut(self, piece: ParameterSlice) -> Factored:
        if piece.shape != self.shape:
            raise ValueError(
                f"cannot cut {piece.parameter!r} of shape {piece.shape} from gradients of shape {self.shape}"
            )
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
        most = min(rows_all, max(1, budget // columns))
        rows = math.ceil(rows_all / math.ceil(rows_all / most))  # tiles of about one height
        samples = 1
        if self.device.type != "cpu" or rows * columns < _SMALL_MATRIX:
            samples = max(1, min(self.n, budget // (rows * columns)))
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
        if left.dtype != out.dtype or not (out.shape[0] == 1 or out.is_contiguous()):
            out.copy_(torch.bmm(left.mT, right))
        elif out.shape[0] == 1:
            torch.mm(left[0].T, right[0], out=out[0])  # no batch overhead: this is the inner loop on CPUs
        else:
            torch.bmm(left.mT, right, out=out)

    @override
    def norms(self, partitions: Sequence[Partition | None]) -> list[Tensor]:
        results: list[Tensor | None] = [None] * len(partitions)
        grams: dict[int, Tensor] = {}
        rest = []
        for k, partition in enumerate(partitions):
            if cost.gram_is_cheaper(self.positions, self.shape, partition):
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
        left, right = _wide(self.left), _wide(self.right)
        cut, kept = (left, right) if axis == 0 else (right, left)
        if 1 - axis not in grams:
            grams[1 - axis] = torch.bmm(kept, kept.mT)
        shared = grams[1 - axis]
        if partition is None:
            return (shared * torch.bmm(cut, cut.mT)).sum((1, 2)).clamp_min_(0).unsqueeze(1).float()
        # ||g^h||^2 = sum_tk l_tk (S l)_tk over the columns k of the piece: one product for all pieces
        return partition.sums((cut * torch.bmm(shared, cut)).sum(1)).clamp_min_(0).float()

    @override
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        marginals: dict[int, Tensor] = {}
        results = []
        for partition, axis in zip(partitions, axes_of(partitions), strict=True):
            if axis not in marginals:
                marginals[axis] = self._marginal_dots(theta, axis)
            values = marginals[axis]
            results.append(values.sum(1, keepdim=True) if partition is None else partition.sums(values))
        return results

    def _marginal_dots(self, theta: Tensor, axis: int) -> Tensor:
        """``<g, theta>`` per index of one axis, ``[n, shape[axis]]``."""
        left, right = _wide(self.left), _wide(self.right)
        theta = theta.to(left.dtype)
        if axis == 0:
            image = right @ theta.T if self._right_image is None else _wide(self._right_image)
            return _dot_over_positions(left, image)
        image = left @ theta if self._left_image is None else _wide(self._left_image)
        return _dot_over_positions(right, image)

    @override
    def gram(self, other: PerSampleGradient | None = None) -> Tensor:
        theirs = self if other is None else other
        if isinstance(theirs, Factored) and cost.pair_gram_is_cheaper(
            self.n, theirs.n, self.positions, theirs.positions, self.shape
        ):
            left = torch.einsum("itr,jsr->ijts", _wide(self.left), _wide(theirs.left))
            right = torch.einsum("itc,jsc->ijts", _wide(self.right), _wide(theirs.right))
            return (left * right).sum((2, 3)).float()
        return Dense(self.dense()).gram(None if other is None else theirs)


def _dot_over_positions(first: Tensor, second: Tensor) -> Tensor:
    dots: Tensor = torch.linalg.vecdot(first, second, dim=1)
    return dots.float()


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second], 1)


def _wide(factor: Tensor) -> Tensor:
    """At least float32: sums of products of half-precision factors would lose what they keep."""
    return factor if factor.dtype.itemsize >= 4 else factor.float()
