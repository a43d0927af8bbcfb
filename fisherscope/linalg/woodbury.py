"""The inverse of a damped full Fisher matrix between samples, from their n x n Gram matrix alone.

With the rows h_k of H, weights w_k > 0, K = H H' and

    F = sum_k w_k h_k h_k' + lam I,

the d x d matrix F is never formed: by the identity of Woodbury (1950), with A = W^(1/2) K W^(1/2),

    H F^-1 H' = W^(-1/2) (A + lam I)^-1 A W^(-1/2),    H F^-1 g = W^(-1/2) (A + lam I)^-1 W^(1/2) H g.

Equal weights 1 / n give n K (K + n lam I)^-1. The usual form with 1 / lam outside subtracts nearly equal
numbers; these do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class DampedFisher:
    """A full Fisher matrix, known through the samples that it is made of.

    Attributes:
        weights: w_k ``[m]``.
        values: eigenvalues of A, which are the non-zero ones of F without damping and zeros, ascending
            ``[m]``.
        vectors: eigenvectors of A, in columns ``[m, m]``.
    """

    weights: Matrix
    values: Matrix
    vectors: Matrix

    @classmethod
    def of(cls, gram: ArrayLike, weights: ArrayLike, size: int) -> Self:
        """From inner products of samples.

        Args:
            gram: K ``[m, m]``, in float64.
            weights: w ``[m]``, > 0; 1 / m each for a mean.
            size: entries d of each h: rounding of the inner products is judged by it.

        Raises:
            ValueError: shapes that do not fit, weights that are not positive, or values that are not finite.
        """
        inner, weight = np.asarray(gram, np.float64), np.asarray(weights, np.float64)
        if inner.shape != (len(weight), len(weight)):
            raise ValueError(f"gram has shape {inner.shape}: with {len(weight)} weights it must be square")
        if not (np.isfinite(inner).all() and np.isfinite(weight).all() and (weight > 0).all()):
            raise ValueError("gram must be finite, and weights positive: a stored gradient may be damaged")
        root = np.sqrt(weight)
        scaled = inner * root[:, None] * root
        values, vectors = np.linalg.eigh((scaled + scaled.T) / 2)
        # what is left of a zero after rounding is zero
        floor = max(values[-1], 0.0) * max(size, len(weight)) * np.finfo(np.float64).eps
        values = np.where(values > floor, values, 0.0)
        return cls(weight, values, vectors)

    @property
    def rank(self) -> int:
        """Number of non-zero eigenvalues."""
        return int(np.count_nonzero(self.values))

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the non-zero eigenvalues; 0 where there are none."""
        return float(self.values.sum() / max(self.rank, 1))

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest non-zero eigenvalue; 0 where there are none."""
        return float(self.values[-self.rank]) if self.rank else 0.0

    def times(self, factor: float) -> Self:
        """The same with all weights times ``factor``."""
        return replace(self, weights=self.weights * factor, values=self.values * factor)

    def within(self, lam: float) -> Matrix:
        """``h_i' F^-1 h_j`` of the samples themselves, ``[m, m]``, symmetric. In-sample.

        With lam far below the smallest non-zero eigenvalue this is ``1 / w`` on the diagonal and 0
        elsewhere, for whatever samples: choose lam near the mean eigenvalue, or see :func:`without_pair`.
        """
        shrunk = self.vectors * (self.values / (self.values + lam))
        root = np.sqrt(self.weights)
        return np.asarray(shrunk @ self.vectors.T / root[:, None] / root)

    def across(self, cross: ArrayLike, lam: float) -> Matrix:
        """``h_i' F^-1 g_j`` of its samples i and others j, ``[m, n]``, from ``cross = H G' [m, n]``."""
        root = np.sqrt(self.weights)
        inside = self.vectors.T @ (np.asarray(cross, np.float64) * root[:, None])
        return np.asarray(self.vectors @ (inside / (self.values + lam)[:, None]) / root[:, None])


def between(gram: ArrayLike, lam: float, cross: ArrayLike | None = None) -> Matrix:
    """``h_i' (H'H / n + lam I)^-1 h_j`` between samples, without any d x d matrix.

    Args:
        gram: K = H H' of the samples that F is made of ``[n, n]``; given in float64.
        lam: damping, > 0.
        cross: H G' ``[n, m]`` where the second samples are others: the result is then
            ``n (K + n lam I)^-1 H G'``.

    Returns:
        ``n K (K + n lam I)^-1`` ``[n, n]``, or ``[n, m]``; float64.

    Raises:
        ValueError: shapes that do not fit, lam <= 0, or values that are not finite.
    """
    if not lam > 0:
        raise ValueError(f"lam is {lam!r}: F has directions without curvature, so the damping must be > 0")
    inner = np.asarray(gram, np.float64)
    fisher = DampedFisher.of(inner, np.full(len(inner), 1 / max(len(inner), 1)), len(inner))
    return fisher.within(lam) if cross is None else fisher.across(cross, lam)


def without_pair(
    pair: ArrayLike, first: ArrayLike, second: ArrayLike, weight_first: float, weight_second: float
) -> Matrix:
    """``h_i' F_-ij^-1 h_j`` where the terms of i and j are taken out of F, from the values with them.

    With X the 2 x 2 matrix of both samples' values and D their weights, it is the off-diagonal entry of
    ``(X^-1 - D)^-1``: exact, for all pairs at once.

    Args:
        pair: X_ij ``[n_a, n_b]``.
        first: X_ii ``[n_a]``.
        second: X_jj ``[n_b]``; not looked at where ``weight_second`` is 0.
        weight_first, weight_second: w of i and of j in F; 0 for a sample that is not in it.

    Returns:
        ``[n_a, n_b]`` float64.
    """
    x = np.asarray(pair, np.float64)
    free_first = 1 - weight_first * np.asarray(first, np.float64)[:, None]
    free_second = 1 - weight_second * np.asarray(second, np.float64) if weight_second else 1.0
    return np.asarray(x / (free_first * free_second - weight_first * weight_second * x**2))
