"""Cosines, from Gram matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def cosines(gram: Matrix) -> Matrix:
    """Cosines ``[n, n]`` of a Gram matrix ``[n, n]``; NaN where a vector is zero."""
    norms = np.sqrt(gram.diagonal().clip(min=0))
    scale = np.divide(1, norms, out=np.full_like(norms, np.nan), where=norms > 0)
    found = gram * scale[:, None]
    found *= scale
    np.clip(found, -1, 1, out=found)
    return np.asarray(found)


def effect_size(cosine: ArrayLike) -> NDArray[np.float64]:
    """``d``: half the Euclidean distance of the two unit vectors, ``sqrt((1 - cos) / 2)``.

    Between 0 (same direction) and 1 (opposite). It is not Cohen's d: two unrelated, orthogonal gradients
    have d = 0.71, so bands such as 0.2 / 0.5 / 0.8 mean nothing here. Filters use the excess cosine.
    """
    return np.sqrt((1 - np.asarray(cosine, np.float64)) / 2)


def mean_off_diagonal(cosine: Matrix) -> float:
    """Mean of the entries off the diagonal, which is 1 throughout; NaN for fewer than two samples."""
    n = len(cosine)
    return float((cosine.sum() - n) / (n * (n - 1))) if n > 1 else float("nan")


class Blocks:
    """Cosines of the samples of two tasks, without the samples that have no gradient.

    Attributes:
        cross: ``[m_a, m_b]``.
        within_a, within_b: ``[m_a, m_a]`` and ``[m_b, m_b]``.
        kept_a, kept_b: which samples of each have a gradient, ``[n_a]`` and ``[n_b]`` bool.
    """

    def __init__(self, gram: Matrix, first: int) -> None:
        """Of a Gram matrix whose first ``first`` samples are the first task's."""
        cosine = cosines(gram)
        defined = ~np.isnan(cosine.diagonal())
        self.kept_a, self.kept_b = defined[:first], defined[first:]
        if not defined.all():
            first = int(self.kept_a.sum())
            cosine = cosine[np.ix_(defined, defined)]
        self.cross = cosine[:first, first:]
        self.within_a, self.within_b = cosine[:first, :first], cosine[first:, first:]

    @property
    def smallest(self) -> int:
        """Samples of the smaller task."""
        return min(len(self.within_a), len(self.within_b))

    @property
    def reference(self) -> float:
        """Mean cosine of different samples of one task, averaged over both; NaN where there are none."""
        known = [m for m in map(mean_off_diagonal, (self.within_a, self.within_b)) if not np.isnan(m)]
        return sum(known) / len(known) if known else float("nan")

    def spread(self, values: Matrix, fill: float) -> Matrix:
        """Values ``[m_a, m_b]`` of these samples as ``[n_a, n_b]``, ``fill`` for all others."""
        if self.kept_a.all() and self.kept_b.all():
            return values
        full = np.full((len(self.kept_a), len(self.kept_b)), fill)
        full[np.ix_(self.kept_a, self.kept_b)] = values
        return full
