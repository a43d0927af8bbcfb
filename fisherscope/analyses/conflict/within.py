"""What cosines within one task say about noise: centred, and each sample on a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherscope.errors import UsageError

Values = NDArray[np.float64]

# No sample's scale is below this share of the task's: a quiet row has not shown that it is quiet.
_FLOOR = 0.3
_NOTHING = 1e-12


@dataclass(frozen=True)
class Within:
    """The reference that one task gives.

    Attributes:
        scaled: centred cosines of all pairs i < i', divided by both samples' scales, ``[n (n - 1) / 2]``.
        first, second: i and i' of each.
        scale: root mean square of each sample's negative centred cosines, ``[n]``.
        pooled: the same over all samples.
    """

    scaled: Values
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    scale: Values
    pooled: float

    @classmethod
    def of(cls, cosines: Values, name: str) -> Within:
        """From the cosines ``[n, n]`` of one task.

        Double centring takes out what all samples of the task share: a coherent task would otherwise have no
        negative cosines to compare with. Only negative cosines make the scale: a cluster of samples that
        agree with each other is no reason to expect opposition. A pair is left out of the scales by which it
        is divided itself.

        Raises:
            ValueError: nothing is left after centring: the samples are copies of each other.
        """
        around = centred(cosines)
        negative = np.minimum(around, 0) ** 2
        is_negative = around < 0
        sums, counts = negative.sum(1), is_negative.sum(1)
        if not sums.any():
            raise UsageError(
                f"{name}: the samples do not differ from each other, which leaves no noise to compare with; "
                "use samples that are not copies of one"
            )
        pooled = float(np.sqrt(sums.sum() / counts.sum()))
        floor = _FLOOR * pooled
        scale = np.maximum(np.sqrt(sums / np.maximum(counts, 1)), floor)
        others = (sums[:, None] - negative).clip(min=0) / np.maximum(counts[:, None] - is_negative, 1)
        without = np.maximum(np.sqrt(others), floor)
        first, second = np.triu_indices(len(around), 1)
        scaled = (around * pooled / (without * without.T))[first, second]
        return cls(scaled, first, second, scale, pooled)


def centred(cosines: Values) -> Values:
    """Cosines of the vectors without their mean, 0 on the diagonal and where a vector is the mean."""
    rows = cosines.mean(0)
    # rows are also the columns: the matrix is symmetric up to rounding
    found = cosines - rows - rows[:, None] + rows.mean()
    found = (found + found.T) / 2
    squares = found.diagonal()
    inverse = np.divide(1, np.sqrt(squares.clip(min=0)), out=np.zeros(len(rows)), where=squares > _NOTHING)
    found *= inverse[:, None]
    found *= inverse
    np.fill_diagonal(found, 0)
    return np.asarray(found)
