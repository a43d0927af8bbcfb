"""How strong a conflict must be for the pair test to call it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fisherscope.analyses.conflict.pair_test import PairStatistics
from fisherscope.analyses.conflict.tail import tail_p_values

# What is supposed: this share of all pairs in conflict, and at least so many as corroborate each other.
_SHARE, _FEWEST = 0.003, 5


def detectable_cosine(cross: NDArray[np.float64], statistics: PairStatistics, level: float) -> float:
    """The cosine from which on typical pairs would be called, if 0.3 % of all pairs were like that.

    It tells "nothing found" from "nothing could have been found": below the reference values of noisy or few
    samples no cosine of more than -1 reaches. The mirror and other corrections than Benjamini-Hochberg may
    ask for more.

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
    # z = cosine x scale of the pair
    scale = float(np.median(statistics.z[present] / cross[present]))
    grid = np.linspace(-1, 0, 201)
    p = tail_p_values(-statistics.reference, -scale * grid, len(statistics.reference), extrapolate=True)
    alike = max(_FEWEST, _SHARE * cross.size)
    called = grid[p <= level * alike / cross.size]
    return float(called.max()) if len(called) else float("nan")
