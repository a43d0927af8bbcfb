"""Which samples of one task oppose another task as a whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fisherscope.analyses.conflict.inputs import finite
from fisherscope.errors import UsageError
from fisherscope.words import counted

_SMALLEST = 1e-300
# Copies of a sample have cosines that differ by the rounding of float32 products.
_ROUNDING = 1e-5


def sample_test(cross: ArrayLike) -> NDArray[np.float64]:
    """One-sided p-values: does this sample oppose the other task on average?

    Null hypothesis of sample i, in words: the mean cosine of i with samples drawn from task B is >= 0.
    The sample is fixed, the n_b columns are independent draws, so Student's t applies along the row:
    t = mean_j c_ij / (sd_j c_ij / sqrt(n_b)), with n_b - 1 degrees of freedom (Student 1908).
    Test the transposed matrix for the samples of B, and correct over both together.

    Args:
        cross: cosines ``[n_a, n_b]``, or ``[..., n_a, n_b]`` for several slices. Multiples give the same.

    Returns:
        p ``[..., n_a]`` float64, in (0, 1]. Where columns fall into a few classes (labels of a softmax), some
        20 of them are needed: a class may be missing among fewer, and all rows of another class are then
        called together. A row without any spread gets 1, since copies are no independent draws. Near copies
        among the columns make p too small: leave them out first.

    Raises:
        ValueError: NaN, wrong shape, or fewer than 2 columns, which leave no measure of spread.
    """
    values = finite("cross", cross, dimensions=(2, 3, 4))
    n = values.shape[-1]
    if n < 2:
        raise UsageError(
            f"cross has shape {values.shape}: with {counted(n, 'sample')} of the other task there is "
            "no measure of spread; at least 2 are needed"
        )
    mean = values.mean(-1)
    error = values.std(-1, ddof=1) / np.sqrt(n)
    t = np.divide(mean, error, out=np.full_like(mean, np.inf), where=varies(values))
    return np.asarray(np.clip(stats.t.cdf(t, n - 1), _SMALLEST, 1))


def varies(cross: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the entries of a row differ by more than rounding, ``[..., n_a]``."""
    return np.asarray(cross.std(-1) > _ROUNDING * np.abs(cross).max(-1, initial=0.0))
