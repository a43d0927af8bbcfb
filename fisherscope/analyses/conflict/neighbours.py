"""Samples that are like one in conflict, and are in none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unconflicted_neighbours(
    names: NDArray[np.object_], cosine: NDArray[np.float64], conflicted: NDArray[np.bool_]
) -> dict[str, str]:
    """For each sample in conflict the one of its task that is most similar and in no conflict.

    Args:
        names: of the samples of one task ``[n]``.
        cosine: of their gradients ``[n, n]``; NaN where a sample has none.
        conflicted: which samples are in conflict ``[n]``.

    Returns:
        By name; samples that have no such neighbour with a cosine above 0 are left out.
    """
    free = np.flatnonzero(~conflicted)
    if not len(free):
        return {}
    found = {}
    for i in np.flatnonzero(conflicted):
        row = np.nan_to_num(cosine[i, free], nan=0.0)
        if row.max() > 0:
            found[str(names[i])] = str(names[free[row.argmax()]])
    return found
