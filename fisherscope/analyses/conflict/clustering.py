"""Clusters of samples within one task, and how far they oppose each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from fisherscope.analyses.conflict.within import centred

Matrix = NDArray[np.float64]


def clusters(cosines: Matrix) -> NDArray[np.int64]:
    """Clusters of the samples of one task: average linkage, until no two have a mean cosine above 0.

    Cosines are centred first (H W H, renormalised), so that what all samples share makes no cluster.

    Args:
        cosines: ``[n, n]``.

    Returns:
        The number of each sample's cluster ``[n]``, from 0.
    """
    n = len(cosines)
    if n < 2:
        return np.zeros(n, np.int64)
    # copies have cosines of 1 up to rounding
    distance = (1 - centred(cosines)).clip(min=0)
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform(distance, checks=False), method="average")
    # two clusters whose mean cosine is 0 are 1 apart: those that are farther are not merged
    return hierarchy.fcluster(tree, t=1.0, criterion="distance").astype(np.int64) - 1


def different_cluster_mean(cosines: Matrix) -> float:
    """Mean cosine (not centred) of samples of different clusters; NaN where all are in one."""
    label = clusters(cosines)
    apart = label[:, None] != label
    return float(cosines[apart].mean()) if apart.any() else float("nan")
