"""Inner products between the positions of two samples, and what follows from them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.analyses.bootstrap import weights
from fisherscope.errors import MemoryBudgetError

_TILE_BYTES = 8 << 20  # near the caches: larger ones are slower
_MATRICES = 4  # as large as that of the inner products, at most, at the same time
_STRIPES = 8

Values = NDArray[np.float64]


class PositionGram:
    """Inner products ``<u_t, u_s>`` of position gradients, of both samples, summed over parameters.

    The gradient of a linear map's weight is a sum over positions, ``g = sum_t d_t a_t'``, and so is the
    natural gradient: ``u = sum_t u_t``, u_t = d_t a_t' / sqrt(F + lam). Positions of the first sample come
    before those of the second. No position's gradient is ever formed but for a few rows of a parameter.

    Attributes:
        first: positions of the first sample.
    """

    def __init__(self, positions_a: int, positions_b: int, memory_budget: int) -> None:
        """Nothing is added up yet.

        Args:
            positions_a: T_a.
            positions_b: T_b.
            memory_budget: bytes, for this and what adding to it takes.

        Raises:
            MemoryBudgetError: the inner products do not fit.
        """
        n = positions_a + positions_b
        needed = _MATRICES * 8 * n * n
        if needed > memory_budget:
            raise MemoryBudgetError(
                f"inner products of {positions_a} and {positions_b} positions would take {needed:,} bytes "
                f"and {memory_budget:,} may be taken: raise memory_budget, or cut samples with max_length"
            )
        self.first = positions_a
        self._tile_bytes = min(_TILE_BYTES, memory_budget - needed)
        self._lower = torch.zeros(n, n, dtype=torch.float64, device="cpu")  # below the diagonal and on it

    def add(self, left: Tensor, right: Tensor, scale: Tensor | None) -> None:
        """Add the inner products of one slice of a parameter.

        Args:
            left: factors of its axis 0, of all positions, ``[T_a + T_b, R]`` float32.
            right: factors of its axis 1, ``[T_a + T_b, C]`` float32.
            scale: what each entry is multiplied with, ``[R, C]`` float32; None for nothing.
        """
        if scale is None:
            left, right = left.double(), right.double()
            self._lower += (left @ left.T) * (right @ right.T)
            return
        n, columns = right.shape
        height = max(1, self._tile_bytes // max(1, 4 * n * columns))
        for top in range(0, len(scale), height):
            rows = slice(top, min(top + height, len(scale)))
            tile = left[:, rows, None] * scale[rows]
            tile *= right[:, None]
            self._add_tile(tile.flatten(1))

    def _add_tile(self, tile: Tensor) -> None:
        """Add the products of the rows of ``tile [T_a + T_b, k]``, stripe by stripe: half of them suffice."""
        n = len(tile)
        step = max(1, -(-n // _STRIPES))
        for start in range(0, n, step):
            stop = min(start + step, n)
            self._lower[start:stop, :stop] += tile[start:stop] @ tile[:stop].T

    @property
    def values(self) -> Values:
        """All of them, ``[T_a + T_b, T_a + T_b]``."""
        lower = torch.tril(self._lower)
        return (lower + torch.tril(lower, -1).T).numpy()

    def carried(self) -> Carried:
        """What the positions carry of the cosine."""
        return Carried(self.values, self.first)


class Carried:
    """The cosine of two samples, divided among their positions.

    Attributes:
        cosine: of the sums over positions; NaN where a sample has no gradient.
        shares: what a pair of positions adds to it, ``[T_a, T_b]``; all add up to the cosine.
    """

    def __init__(self, gram: Values, first: int) -> None:
        """Of inner products ``[T_a + T_b, T_a + T_b]``."""
        self._a, self._b = gram[:first, :first], gram[first:, first:]
        self._cross = cross = gram[:first, first:]
        norms = np.sqrt(max(self._a.sum(), 0.0)) * np.sqrt(max(self._b.sum(), 0.0))
        self.shares: Values = cross / norms if norms > 0 else np.full_like(cross, np.nan)
        self.cosine = float(self.shares.sum()) if norms > 0 else float("nan")

    @property
    def of_a(self) -> Values:
        """Contribution of each position of the first sample, ``[T_a]``: they add up to the cosine."""
        return np.asarray(self.shares.sum(1))

    @property
    def of_b(self) -> Values:
        """Contribution of each position of the second sample, ``[T_b]``."""
        return np.asarray(self.shares.sum(0))

    def lowest(self, k: int) -> list[tuple[int, int, float]]:
        """The pairs of positions that take most from the cosine: (position of a, of b, contribution < 0)."""
        order = np.argsort(self.shares, axis=None, kind="stable")[:k]
        places = zip(*np.unravel_index(order, self.shares.shape), strict=True)
        found = [(int(t), int(s), float(self.shares[t, s])) for t, s in places]
        return [pair for pair in found if pair[2] < 0]

    def resampled(self, weights_a: Values, weights_b: Values) -> Values:
        """Cosines with the positions reweighted.

        Args:
            weights_a: ``[replicates, T_a]``.
            weights_b: ``[replicates, T_b]``.

        Returns:
            ``[replicates]``; NaN where nothing is left of a sample.
        """
        products = ((weights_a @ self._cross) * weights_b).sum(1)
        squares_a = ((weights_a @ self._a) * weights_a).sum(1).clip(min=0)
        squares_b = ((weights_b @ self._b) * weights_b).sum(1).clip(min=0)
        scale = np.sqrt(squares_a) * np.sqrt(squares_b)
        return np.asarray(np.divide(products, scale, out=np.full_like(products, np.nan), where=scale > 0))

    def interval(self, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
        """Bootstrap percentile interval of the cosine, over positions of both samples.

        A resample that takes some positions twice and others not at all has longer gradients than the sample
        has, by a known factor on average: ``E |u*|^2 = |u|^2 (1 - 1/T) + sum_t |u_t|^2`` for sums. That alone
        would draw all cosines towards 0, off the observed one, and is taken out; Efron and Tibshirani (1993),
        chapter 13, for the interval itself.

        Returns:
            Lower and upper end; NaN where the cosine is not defined.
        """
        if np.isnan(self.cosine):
            return float("nan"), float("nan")
        rng = np.random.default_rng(seed)
        drawn = [weights(len(gram), resamples, rng) for gram in (self._a, self._b)]
        found = self.resampled(*drawn) * _lengthening(self._a) * _lengthening(self._b)
        tail = (1 - confidence) / 2
        found = found[~np.isnan(found)]
        if not len(found):
            return float("nan"), float("nan")
        low, high = np.quantile(found.clip(-1, 1), [tail, 1 - tail])
        return float(low), float(high)


def _lengthening(gram: Values) -> float:
    """By how much the root mean square norm of resamples exceeds the norm of the sample."""
    return float(np.sqrt(1 - 1 / len(gram) + gram.trace() / gram.sum()))
