"""How a sample's gradient g_i becomes the h_i that is compared between samples of unequal length."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Normalization = Literal["per_token", "none", "mean"]

NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)


def factors(tokens: ArrayLike, normalization: str) -> NDArray[np.float64]:
    """Factors that make h_i of g_i: ``1 / sqrt(T_i)`` ("per_token"), 1 ("none") or ``1 / T_i`` ("mean").

    Args:
        tokens: T_i, loss-bearing tokens of each sample, ``[n]``.
        normalization: one of :data:`NORMALIZATIONS`.

    Returns:
        ``[n]`` float64.

    Raises:
        ValueError: another normalization.
    """
    counts = np.asarray(tokens, np.float64)
    match normalization:
        case "per_token":
            return counts**-0.5
        case "none":
            return np.ones_like(counts)
        case "mean":
            return 1 / counts
    raise ValueError(f"unknown normalization {normalization!r}: it is one of {', '.join(NORMALIZATIONS)}")
