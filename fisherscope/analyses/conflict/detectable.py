"""How strong a conflict must be for the pair test to call it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fisherscope.analyses.conflict.pair_test import PairStatistics
from fisherscope.analyses.conflict.tail import tail_p_values

# What is supposed: this share of all pairs in conflict, at least so many as corroborate each other, of which
# this share is to be found.
_SHARE, _FEWEST, _POWER = 0.003, 10, 0.8


def detectable_cosine(cross: NDArray[np.float64], statistics: PairStatistics, level: float) -> float:
    """The cosine at which four of five pairs would be called, if 0.3 % of all pairs (or ten) were like that.

    It tells "nothing found" from "nothing could have been found": where the noise of single tasks is wide no
    cosine of more than -1 stands out. A rough figure, on the scales of the pairs that there are, for
    Benjamini-Hochberg.

    Args:
        cross: cosines ``[n_a, n_b]``.
        statistics: those of the same pairs.
        level: false discovery rate.

    Returns:
        In [-1, 0]; NaN where even -1 would not be called.
    """
    present = cross != 0
    if not present.any():
        return float("nan")
    grid = np.linspace(-1, 0, 201)
    p = np.maximum(
        tail_p_values(
            -statistics.reference, -_low_scale(statistics.z, cross, present) * grid, len(statistics.reference)
        ),
        tail_p_values(
            statistics.mirrored[statistics.mirrored > 0],
            -_low_scale(statistics.mirrored, cross, present) * grid,
            statistics.mirrored.size,
        ),
    )
    alike = max(_FEWEST, _SHARE * cross.size)
    called = grid[p <= level * _POWER * alike / cross.size]
    return float(called.max()) if len(called) else float("nan")


def _low_scale(z: NDArray[np.float64], cross: NDArray[np.float64], present: NDArray[np.bool_]) -> float:
    """What makes z of a cosine, for a pair with louder samples than most."""
    return float(np.quantile(z[present] / cross[present], 1 - _POWER))
