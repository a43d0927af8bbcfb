"""Tests of a pair's cosine that look natural and do not hold on real gradients: for comparison only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


def random_direction(u: Array, v: Array) -> Array:
    """As if unit gradients were uniform on the sphere: cos sqrt(d) is standard normal."""
    return np.asarray(stats.norm.cdf(u @ v.T * np.sqrt(u.shape[1])))


def coordinates(u: Array, v: Array) -> Array:
    """Student's t over the coordinates of u * v, as if they were independent."""
    d = u.shape[1]
    mean = u @ v.T / d
    variance = ((u**2) @ (v**2).T / d - mean**2) * d / (d - 1)
    return np.asarray(stats.t.cdf(mean / np.sqrt(variance / d), d - 1))


def effective_dimension(u: Array, v: Array) -> Array:
    """As if cos sqrt(d_eff) were standard normal, with d_eff = tr(C)^2 / tr(C^2) of both tasks together."""
    gram = np.concatenate([u, v]) @ np.concatenate([u, v]).T
    n = len(gram)
    # unbiased: pairs of different samples only
    d = 1 / ((np.sum(gram**2) - np.sum(gram.diagonal() ** 2)) / (n * (n - 1)))
    return np.asarray(stats.norm.cdf(u @ v.T * np.sqrt(d)))


NAIVE: dict[str, Callable[[Array, Array], Array]] = {
    "naive z": random_direction,
    "naive t": coordinates,
    "naive d_eff": effective_dimension,
}
