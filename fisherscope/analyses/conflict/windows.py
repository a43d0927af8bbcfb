"""Neighbouring samples averaged before anything is tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


@dataclass(frozen=True)
class Windows:
    """The first samples of a task, ``width`` neighbours at a time; the last window may have fewer.

    Attributes:
        rows: samples that take part.
        width: samples per window; with 1 a window is a sample.
    """

    rows: int
    width: int = 1

    def __len__(self) -> int:
        return math.ceil(self.rows / self.width)

    @property
    def starts(self) -> NDArray[np.int64]:
        """First sample of each window."""
        return np.arange(0, self.rows, self.width)

    def of_rows(self) -> NDArray[np.int64]:
        """Window of each sample, ``[rows]``."""
        return np.arange(self.rows) // self.width

    def names(self, ids: Sequence[str]) -> list[str]:
        """Name of each window: the id of its sample, or the first and last ones, as in "math_0..math_3"."""
        if self.width == 1:
            return list(ids[: self.rows])
        ends = np.minimum(self.starts + self.width, self.rows) - 1
        return [f"{ids[a]}..{ids[b]}" if b > a else ids[a] for a, b in zip(self.starts, ends, strict=True)]

    @staticmethod
    def average(gram: NDArray[np.float64], parts: Sequence[Windows]) -> NDArray[np.float64]:
        """Gram matrix of the averages, from that of the samples of all parts, one after the other."""
        if all(part.width == 1 for part in parts):
            return gram
        matrix = sparse.block_diag([part._averaging() for part in parts], format="csr")
        return np.asarray((matrix @ (matrix @ gram).T).T)

    def _averaging(self) -> sparse.csr_array:
        """What averages rows, ``[windows, rows]``."""
        windows = self.of_rows()
        weights = 1 / np.bincount(windows)[windows]
        return sparse.csr_array((weights, (windows, np.arange(self.rows))), shape=(len(self), self.rows))
