"""Count, mean and second central moment of a stream, mergeable in any number of parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Moments:
    """Running moments of vectors, in float64.

    Merging is Chan's parallel form of Welford's update (Chan, Golub & LeVeque 1983): exact up to
    rounding for any split of the data, and without the cancellation of ``E[x^2] - E[x]^2``.

    Attributes:
        count: number of vectors seen.
        mean: ``[k]``.
        m2: ``[k]``, sum of squared deviations from the mean.
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def empty(cls, size: int) -> Moments:
        """Moments of no vectors of length ``size``."""
        return cls(0, np.zeros(size), np.zeros(size))

    @classmethod
    def of(cls, values: ArrayLike) -> Moments:
        """Moments of the rows of ``values [n, k]``, by the two-pass formula."""
        rows = np.asarray(values, dtype=np.float64)
        if not len(rows):
            return cls.empty(rows.shape[1])
        mean = rows.mean(0)
        deviations = rows - mean
        return cls(len(rows), mean, np.einsum("nk,nk->k", deviations, deviations))

    def merge(self, other: Moments) -> Moments:
        """Moments of both streams together."""
        count = self.count + other.count
        if not self.count or not other.count:
            return other if other.count else self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def variance(self) -> NDArray[np.float64]:
        """Unbiased sample variance ``[k]``; NaN for fewer than two vectors."""
        if self.count < 2:
            return np.full_like(self.mean, np.nan)
        return self.m2 / (self.count - 1)
