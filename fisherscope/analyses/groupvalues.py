"""Group values of a task, some samples at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherscope.linalg.normalization import factors
from fisherscope.store import ContributionStore


@dataclass(frozen=True)
class GroupChunk:
    """Group values of consecutive samples.

    Attributes:
        first: row of the first sample.
        square: ``sum g^2`` over each group, ``[rows, groups]``.
        dot: ``<g, theta>`` over each group, ``[rows, groups]``.
        tokens: loss-bearing tokens ``[rows]``.
    """

    first: int
    square: NDArray[np.float64]
    dot: NDArray[np.float64]
    tokens: NDArray[np.float64]

    def contributions(self, normalization: str) -> NDArray[np.float64]:
        """``sum h^2`` over each group, ``[rows, groups]``."""
        return np.asarray(self.square * factors(self.tokens, normalization)[:, None] ** 2)


def group_chunks(store: ContributionStore, task: str, memory_budget: int) -> Iterator[GroupChunk]:
    """Group values of all samples of a task in task order, within a budget of memory."""
    values = store.group_values(task)
    tokens = values["tokens"].to_numpy().astype(np.float64)
    step = max(1, memory_budget // (32 * max(1, values.sizes["group"])))
    for start in range(0, values.sizes["sample"], step):
        rows = values.isel(sample=slice(start, start + step))
        yield GroupChunk(
            start,
            rows["square"].to_numpy().astype(np.float64),
            rows["dot"].to_numpy().astype(np.float64),
            tokens[start : start + step],
        )
