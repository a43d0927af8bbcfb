"""Per-sample gradients of matrices, cut to a few singular vectors each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.linalg.dense import Dense
from fisherscope.linalg.factored import Factored
from fisherscope.linalg.gradient import PerSampleGradient


class LowRank(Factored):
    """Approximations ``U_i' V_i`` of gradients, with the error of each.

    A :class:`Factored` whose terms are singular vectors in place of positions: all of its algebra holds.

    Attributes:
        error: ``||g_i - U_i' V_i|| / ||g_i||``, Frobenius, float32 ``[n]``; 0 for a gradient of zero. A slice
            or another scale has an error of its own or the same: :meth:`cut` gives a plain ``Factored``.
    """

    def __init__(self, left: Tensor, right: Tensor, error: Tensor) -> None:
        """Hold ``left [n, r, R]``, ``right [n, r, C]`` and ``error [n]``."""
        super().__init__(left, right)
        if error.shape != (self.n,):
            raise ValueError(f"expected one error for each of {self.n} samples, got {tuple(error.shape)}")
        self.error = error

    @property
    def rank(self) -> int:
        """The number of outer products per sample."""
        return self.positions

    @classmethod
    def of(
        cls, gradient: PerSampleGradient, rank: int, rounding: Callable[[Tensor], Tensor] | None = None
    ) -> LowRank:
        """The best approximation of each gradient by ``rank`` outer products (Eckart, Young 1936).

        Computed in float64, sample by sample: by the singular values of a small matrix between orthonormal
        bases of both factors where positions are fewer than rows or columns, else of the gradient itself.

        Args:
            gradient: of a matrix.
            rank: at least 1; terms beyond the rank of the matrix are zero.
            rounding: applied to ``[r, R]`` and ``[r, C]``; the errors are of what it gives.

        Raises:
            ValueError: the parameter is no matrix.
        """
        if len(gradient.shape) != 2 or rank < 1:
            raise ValueError(f"no approximation of rank {rank} of gradients of shape {gradient.shape}")
        found = [_truncated(*parts, rank, rounding) for parts in _in_bases(gradient)]
        if not found:
            empty = [
                torch.empty(0, rank, size, device=gradient.device, dtype=torch.float32)
                for size in gradient.shape
            ]
            return cls(empty[0], empty[1], torch.empty(0, device=gradient.device, dtype=torch.float32))
        left, right, error = (torch.stack(values) for values in zip(*found, strict=True))
        rows, columns = _present(gradient)
        return cls(left * rows, right * columns, error)

    @override
    def scaled(self, factors: Tensor) -> LowRank:
        """Scale the smaller of the two factors; relative errors stay."""
        scaled = super().scaled(factors)
        return LowRank(scaled.left, scaled.right, self.error)


def _present(gradient: PerSampleGradient) -> tuple[Tensor, Tensor]:
    """Which rows ``[n, 1, R]`` and columns ``[n, 1, C]`` are not zero throughout.

    Singular vectors have rounding where a gradient has a row of zeros. A head without any gradient would be
    given one, which is no longer small once it is divided by its own F.
    """
    if isinstance(gradient, Factored):
        return gradient.left.any(1, keepdim=True), gradient.right.any(1, keepdim=True)
    values = gradient.values if isinstance(gradient, Dense) else gradient.dense()
    return values.any(2)[:, None], values.any(1)[:, None]


def _in_bases(gradient: PerSampleGradient) -> Iterator[tuple[Tensor | None, Tensor, Tensor | None]]:
    """Each sample as ``A core B'``, with orthonormal columns in A and B; None stands for the unit matrix."""
    if not isinstance(gradient, Factored):
        values = gradient.values if isinstance(gradient, Dense) else gradient.dense()
        yield from ((None, value.double(), None) for value in values)
        return
    for left, right in zip(gradient.left, gradient.right, strict=True):
        (a, core_left), (b, core_right) = _basis(left.double().mT), _basis(right.double().mT)
        yield a, core_left @ core_right.mT, b


def _basis(factor: Tensor) -> tuple[Tensor | None, Tensor]:
    """``factor [rows, T]`` as ``Q R``; itself where it has no more rows than columns."""
    if factor.shape[0] <= factor.shape[1]:
        return None, factor
    q, r = torch.linalg.qr(factor)
    return q, r


def _truncated(
    a: Tensor | None, core: Tensor, b: Tensor | None, rank: int, rounding: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Left ``[rank, R]``, right ``[rank, C]`` and the relative error of ``A core B'``."""
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = root[:, None] * u.mT[:rank], root[:, None] * vh[:rank]
    left, right = left if a is None else left @ a.mT, right if b is None else right @ b.mT
    left, right = (_filled(factor, rank) for factor in (left, right))
    left, right = (factor.float() if rounding is None else rounding(factor) for factor in (left, right))
    return left, right, _relative_error(a, core, b, left.double(), right.double()).float()


def _filled(factor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, 0, 0, rank - len(factor)))


def _relative_error(a: Tensor | None, core: Tensor, b: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``||A core B' - left' right|| / ||core||`` without forming either of size ``[R, C]``.

    What left and right have within the bases is subtracted as a matrix, so nothing cancels; rounding takes
    them out of the bases, and that part is added as it is.
    """
    square = core.square().sum()
    if not square > 0:
        return square.new_zeros(())
    inner_left, outer_left = _split(left, a)
    inner_right, outer_right = _split(right, b)
    within = (core - inner_left.mT @ inner_right).square().sum()
    # the four parts of left' right lie in orthogonal spaces
    beyond = _product_square(outer_left, right) + _product_square(inner_left, outer_right)
    return ((within + beyond).clamp_min(0) / square).sqrt()


def _split(factor: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Coordinates in the basis, and what is left of the factor beside it."""
    if basis is None:
        return factor, None
    inner = factor @ basis
    return inner, factor - inner @ basis.mT


def _product_square(left: Tensor | None, right: Tensor | None) -> Tensor | float:
    """``||left' right|| ** 2``."""
    return 0.0 if left is None or right is None else ((left @ left.mT) * (right @ right.mT)).sum()
