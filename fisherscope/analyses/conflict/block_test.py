"""Whether two tasks, or two groups of samples, oppose each other on average."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fisherscope.analyses.conflict.inputs import finite
from fisherscope.errors import UsageError

Values = NDArray[np.float64]

_SMALLEST = 1e-300


def block_test(cross: ArrayLike, *, margin: ArrayLike = 0.0) -> tuple[Values, Values]:
    """One-sided t-test: is the mean cosine of two tasks below -margin?

    Null hypothesis, in words: over samples drawn from both tasks, the mean cosine is not below -margin. All
    n_a n_b entries are not independent, since those of a row share a sample; so are those of a column. The
    variance is clustered both ways (Cameron, Gelbach and Miller 2011, equation 2.5; Miglioretti and Heagerty
    2007): with e = c - mean c,

        V_row  = n_a / (n_a - 1) sum_i (sum_j e_ij)^2 / (n_a n_b)^2,  V_column likewise,
        V_cell = sum_ij e_ij^2 / (n_a n_b)^2,
        V = max(V_row + V_column - V_cell, V_row, V_column),
        t = (mean c + margin) / sqrt(V),  min(n_a, n_b) - 1 degrees of freedom.

    Against a margin of 0 tiny, real means are found (labels of a softmax compete): give what counts as small,
    for instance minus the mean cosine of samples of different clusters of one task. Read the mean beside p.

    Args:
        cross: cosines ``[n_a, n_b]``, or ``[..., n_a, n_b]`` for several blocks.
        margin: >= 0; broadcast over the leading axes.

    Returns:
        t and p, each ``[...]`` float64 (0-dimensional for one matrix), p in (0, 1]. With 2 or 3 samples of a
        task the degrees of freedom are 1 or 2, and p is rarely small. Where entries do not vary t = 0, p = 1.

    Raises:
        ValueError: NaN, wrong shape, fewer than 2 samples of a task, or a negative margin.
    """
    values = finite("cross", cross, dimensions=(2, 3, 4))
    bound = np.asarray(margin, np.float64)
    if not (bound >= 0).all():
        raise UsageError(f"margin is {margin!r}: it is how far below 0 a mean still counts as none, >= 0")
    n_a, n_b = values.shape[-2:]
    if min(n_a, n_b) < 2:
        raise UsageError(f"cross has shape {values.shape}: the test needs at least 2 samples of each task")
    mean = values.mean((-2, -1))
    rest = values - mean[..., None, None]
    size = (n_a * n_b) ** 2
    row = n_a / (n_a - 1) * (rest.sum(-1) ** 2).sum(-1) / size
    column = n_b / (n_b - 1) * (rest.sum(-2) ** 2).sum(-1) / size
    cell = (rest**2).sum((-2, -1)) / size
    error = np.sqrt(np.maximum(row + column - cell, np.maximum(row, column)))
    # equal entries differ by the rounding of float32 products only
    spread = values.std((-2, -1)) > 1e-5 * np.abs(values).max((-2, -1))
    mean = mean + bound
    t = np.divide(mean, error, out=np.zeros_like(mean), where=spread)
    p = np.where(spread, stats.t.cdf(t, min(n_a, n_b) - 1), 1.0)
    return np.asarray(t), np.clip(p, _SMALLEST, 1)
