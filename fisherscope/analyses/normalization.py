"""From sums over a sample's tokens to what is compared between samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

NORMALIZATIONS = ("none", "per_token", "mean")


def factors(tokens: ArrayLike, normalization: str) -> NDArray[np.float64]:
    """Factors ``[n]`` that make h_i of g_i: 1, ``1 / sqrt(T_i)`` or ``1 / T_i``.

    Args:
        tokens: loss-bearing tokens T_i of each sample.
        normalization: "none", "per_token" or "mean".

    Raises:
        ValueError: another normalization.
    """
    counts = np.asarray(tokens, np.float64)
    if normalization == "none":
        return np.ones_like(counts)
    if normalization == "per_token":
        return counts**-0.5
    if normalization == "mean":
        return 1 / counts
    raise ValueError(f"unknown normalization {normalization!r}: it is one of {', '.join(NORMALIZATIONS)}")
