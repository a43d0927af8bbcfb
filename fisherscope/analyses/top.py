"""The highest-scoring pairs of a stream of matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class TopPairs:
    """Keeps the ``k`` highest entries of many matrices, each known by a label number.

    Ties go to the lower label, then to the lower row and column.

    Attributes:
        k: how many.
        scores: the highest scores, in descending order.
        places: label, row and column of each ``[found, 3]``.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.scores: NDArray[np.float64] = np.zeros(0)
        self.places: NDArray[np.int64] = np.zeros((0, 3), np.int64)

    def offer(
        self, scores: NDArray[np.floating], label: int, *, first_row: int = 0, first_column: int = 0
    ) -> None:
        """Consider the entries of ``scores [rows, columns]``; NaN and -inf are never kept.

        Args:
            scores: the matrix, or some of its rows and columns.
            label: number of the matrix.
            first_row, first_column: numbers of the first row and column, where it is a part of the matrix.
        """
        flat = scores.reshape(-1)
        # most matrices have little above what is kept already; what equals it may still come before it
        lowest = self.scores[-1] if len(self.scores) == self.k else -np.inf
        place = np.flatnonzero(flat >= lowest if np.isfinite(lowest) else flat > lowest)
        if len(place) > self.k:
            bound = np.partition(flat[place], len(place) - self.k)[len(place) - self.k]
            place = place[flat[place] >= bound]
        row, column = np.divmod(place, max(1, scores.shape[1]))
        added = np.stack([np.full_like(row, label), first_row + row, first_column + column], 1)
        self.scores = np.concatenate([self.scores, flat[place].astype(np.float64)])
        self.places = np.concatenate([self.places, added])
        order = np.lexsort([*self.places.T[::-1], -self.scores])[: self.k]
        self.scores, self.places = self.scores[order], self.places[order]
