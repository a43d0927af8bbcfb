"""Resampling of samples with replacement, for all groups at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def weights(n: int, replicates: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Weights of the samples in each resample.

    Drawing n of n samples with replacement gives multinomial counts; every group sees the same draws, so
    that ranks within a resample belong together (Efron 1979).

    Returns:
        ``[replicates, n]``; each row sums to 1.
    """
    return rng.multinomial(n, np.full(n, 1 / n), size=replicates) / n


def means(
    values: NDArray[np.float64], resamples: NDArray[np.float64], memory_budget: int
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Means of the resampled values, some columns at a time.

    Args:
        values: ``[n, k]``.
        resamples: ``[replicates, n]`` from :func:`weights`.
        memory_budget: bytes for the means of one step.

    Yields:
        Columns as a slice, and ``[replicates, columns]``.
    """
    step = max(1, memory_budget // (8 * max(1, len(resamples))))
    for start in range(0, values.shape[1], step):
        columns = slice(start, min(start + step, values.shape[1]))
        yield columns, resamples @ values[:, columns]


def percentile_interval(
    values: NDArray[np.float64], resamples: NDArray[np.float64], confidence: float, memory_budget: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bootstrap percentile interval of the mean of each column.

    Its coverage falls short of the nominal one for few, very skewed samples; the table's largest sample
    share shows where that is so.

    Args:
        values: ``[n, k]``.
        resamples: ``[replicates, n]`` from :func:`weights`.
        confidence: 0.95, say.
        memory_budget: bytes for the resampled means held at a time.

    Returns:
        Lower and upper ends, ``[k]`` each.
    """
    ends = np.empty((2, values.shape[1]))
    tail = (1 - confidence) / 2
    for columns, found in means(values, resamples, memory_budget):
        ends[:, columns] = np.quantile(found, [tail, 1 - tail], axis=0)
    return ends[0], ends[1]
