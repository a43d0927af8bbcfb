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
from fisherscope.linalg.gradient import PerSampleGradient, axes_of, largest, pieces, tile_bytes


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
        samples = max(1, min(self.n, budget // (rows * columns)))
        buffer = torch.empty(samples * rows * columns, device=self.device, dtype=torch.float32)
        for top in range(0, rows_all, rows):
            span = slice(top, min(top + rows, rows_all))
            left = self.left[:, :, span].mT
            for start in range(0, self.n, samples):
                chosen = slice(start, min(start + samples, self.n))
                size = (chosen.stop - chosen.start, span.stop - span.start, columns)
                tile = buffer[: math.prod(size)].view(size)
                _multiply(left[chosen], self.right[chosen], tile)
                yield chosen, span, tile

    @override
    def bounds(self) -> Tensor:
        """The sum over positions of the products of both sides' largest entries."""
        left, right = (largest(factor).cpu().double() for factor in (self.left, self.right))
        return (left * right).sum(1)

    @override
    def balanced(self) -> Factored:
        """Both sides of about one size: powers of two go from the one to the other, sample by sample."""
        left, right = (largest(factor.flatten(1)).cpu().double() for factor in (self.left, self.right))
        known = (left > 0) & (right > 0) & left.isfinite() & right.isfinite()
        apart = torch.where(known, torch.frexp(left)[1] - torch.frexp(right)[1], 0)
        powers = torch.exp2((apart // 2).double()).view(-1, 1, 1)
        # half of the range of exponents at most: a float32 holds each
        return Factored(self.left * (1 / powers).to(self.left), self.right * powers.to(self.right))

    @override
    def norms(self, partitions: Sequence[Partition | None]) -> list[Tensor]:
        along = axes_of(partitions)
        if not all(cost.gram_is_cheaper(self.positions, self.shape, axis) for axis in set(along)):
            return self.accumulate(partitions=partitions)
        return pieces(partitions, along, {axis: self._marginal_squares(axis) for axis in set(along)})

    def _marginal_squares(self, axis: int) -> Tensor:
        """``sum g ** 2`` per index of one axis, ``[n, shape[axis]]``, from a Gram matrix over positions.

        With S the inner products of the other side's positions, ``sum_c g_kc ** 2 = sum_ts l_tk S_ts l_sk``.
        The mean over positions m is taken apart, ``r_t = m + c_t``: activations have large common parts,
        which cancel where the l_t of a sample add up to little, as those of keys do.
        """
        cut, kept = (self.left, self.right) if axis == 0 else (self.right, self.left)
        out = torch.empty(self.n, self.shape[axis], device=self.device, dtype=torch.float32)
        for samples in self._blocks(2 * self.shape[axis]):
            mine, other = _wide(cut[samples]), _wide(kept[samples])
            mean = other.mean(1, keepdim=True)
            centred = other - mean
            summed = mine.sum(1, keepdim=True)
            # sum_ts l_t l_s (c_t . c_s + 2 c_t . m), and then (sum_t l_t)^2 |m|^2
            across = torch.bmm(2 * torch.bmm(centred, mean.mT), summed)
            image = torch.baddbmm(across, torch.bmm(centred, centred.mT), mine)
            common = summed.squeeze(1).square_() * mean.square().sum(2)
            out[samples] = image.mul_(mine).sum(1).add_(common)
        return out.clamp_min_(0)

    @override
    def dots(self, theta: Tensor, partitions: Sequence[Partition | None]) -> list[Tensor]:
        along = axes_of(partitions)
        return pieces(partitions, along, {axis: self._marginal_dots(theta, axis) for axis in set(along)})

    def _marginal_dots(self, theta: Tensor, axis: int) -> Tensor:
        """``<g, theta>`` per index of one axis, ``[n, shape[axis]]``."""
        if axis == 0:
            mine, other, image, weight = self.left, self.right, self._right_image, theta.T
        else:
            mine, other, image, weight = self.right, self.left, self._left_image, theta
        out = torch.empty(self.n, self.shape[axis], device=self.device, dtype=torch.float32)
        for samples in self._blocks(self.shape[axis]):
            first = _wide(mine[samples])
            second = (
                _wide(other[samples]) @ weight.to(first.dtype) if image is None else _wide(image[samples])
            )
            out[samples] = (first * second).sum(1)
        return out

    @override
    def contracted(self, vector: Tensor, axis: int) -> Tensor:
        kept, other = (self.left, self.right) if axis == 0 else (self.right, self.left)
        weights = _wide(other) @ vector.to(_wide(other).dtype)
        return torch.bmm(weights.unsqueeze(1), _wide(kept)).squeeze(1)

    def _blocks(self, width: int) -> Iterator[slice]:
        """Samples at a time, so that ``width`` values for each of their positions fit a tile."""
        step = max(1, tile_bytes(self.device) // max(1, 4 * self.positions * width))
        return (slice(start, start + step) for start in range(0, self.n, step))

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


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype != out.dtype:
        out.copy_(torch.bmm(left, right))
    elif len(out) == 1:
        torch.mm(left[0], right[0], out=out[0])  # no batch overhead
    else:
        torch.bmm(left, right, out=out)


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second], 1)


def _wide(factor: Tensor) -> Tensor:
    """At least float32: sums of products of half-precision factors would lose what they keep."""
    return factor if factor.dtype.itemsize >= 4 else factor.float()
