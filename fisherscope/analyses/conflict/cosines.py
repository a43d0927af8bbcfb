"""Cosines in natural-gradient space, from Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Matrix = NDArray[np.float64]


def whiten(gradients: Tensor, fisher: Tensor, lam: float) -> Tensor:
    """Natural gradients under the diagonal Fisher: ``u = h / sqrt(F + lam)``.

    Args:
        gradients: h ``[n, k]``.
        fisher: F ``[k]``.
        lam: damping, > 0.

    Returns:
        ``[n, k]`` float32.
    """
    return gradients / (fisher + lam).sqrt()


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


@dataclass(frozen=True)
class Level:
    """Cosines of a pair of tasks at one slice, block, layer, or over the whole model.

    Attributes:
        mean, min: over the pairs of samples across tasks.
        share_negative: share of these pairs below 0.
        reference: mean cosine of different samples of one task, averaged over both tasks.
        undefined: share of the pairs without a cosine, because a sample has no gradient there.
    """

    mean: float
    min: float
    share_negative: float
    reference: float
    undefined: float

    @property
    def excess(self) -> float:
        """How much less aligned (negative) samples of both tasks are than samples of one task."""
        return self.mean - self.reference

    @classmethod
    def of(cls, cosine: Matrix, first: int) -> Level:
        """Summary of ``cosine [n, n]``, whose first ``first`` samples are the first task's."""
        pairs = first * (len(cosine) - first)
        defined = ~np.isnan(cosine.diagonal())
        if not defined.all():
            first = int(defined[:first].sum())
            cosine = cosine[np.ix_(defined, defined)]
        across = cosine[:first, first:]
        within = [_mean_off_diagonal(cosine[:first, :first]), _mean_off_diagonal(cosine[first:, first:])]
        known = [value for value in within if not np.isnan(value)]
        reference = sum(known) / len(known) if known else float("nan")
        if not across.size:
            return cls(float("nan"), float("nan"), float("nan"), reference, 1.0)
        return cls(
            float(across.mean()),
            float(across.min()),
            np.count_nonzero(across < 0) / across.size,
            reference,
            1 - across.size / pairs,
        )


def _mean_off_diagonal(cosine: Matrix) -> float:
    """Mean of the entries off the diagonal, which is 1 throughout."""
    n = len(cosine)
    return float((cosine.sum() - n) / (n * (n - 1))) if n > 1 else float("nan")
