"""All pairs of samples of two tasks on one head slice, within a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.interference.form import FORMS, gradient_scale, product, whitening
from fisherscope.analyses.slices import Loaded, SliceReader

# How many tensors of the size of the scores exist at the same time, at most, while working on them.
_COPIES = 8


def row_stretches(rows: int, columns: int, budget: int) -> list[slice]:
    """Stretches of rows so that scores with so many columns, and what is made of them, fit the budget."""
    step = max(1, budget // (4 * _COPIES * columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class Stretch:
    """Some rows and columns of M.

    Attributes:
        rows, columns: which.
        scores: M there; NaN where a sample meets itself.
        magnitude: M if each sample's operand were spread evenly over the slice; None where the form is
            signed.
        reported: what is reported of single pairs, where that differs from M.
    """

    rows: slice
    columns: slice
    scores: Tensor
    magnitude: Tensor | None = None
    reported: Tensor | None = None

    def blank_diagonal(self) -> None:
        """Set NaN where a task meets itself and a sample itself."""
        rows = torch.arange(self.rows.start, self.rows.stop, dtype=torch.int64, device="cpu")[:, None]
        own = rows == torch.arange(self.columns.start, self.columns.stop, dtype=torch.int64, device="cpu")
        for values in (self.scores, self.magnitude, self.reported):
            if values is not None:
                values.masked_fill_(own, torch.nan)


class PairScorer:
    """Scores of ordered pairs of tasks on one slice, for the forms that weigh each entry by itself.

    Attributes:
        rows: samples that form pairs, per task: the first whose gradients are stored.
    """

    def __init__(self, reader: SliceReader, tasks: tuple[str, ...], config: InterferenceConfig) -> None:
        self.reader, self.config = reader, config
        self.rows = {task: reader.usable(task, config.max_samples_per_task) for task in tasks}
        self._form = FORMS[config.form]
        self._left = {task: self._power(task, self._form.left_power) for task in tasks}
        self._right = {task: self._right_factors(task) for task in tasks}

    def _power(self, task: str, power: int) -> Tensor | None:
        return self.reader.factors(task) ** power if power else None

    def _right_factors(self, task: str) -> Tensor | None:
        scale = gradient_scale(self.reader.store, task, self.config.normalize_gj)
        return self._power(task, self._form.right_power) if scale is None else scale

    def stretches(self, loaded: Loaded, a: str, b: str, fisher: Tensor, lam: float) -> Iterator[Stretch]:
        """M in stretches of rows (samples of the first task) and columns (samples of the second).

        Args:
            loaded: gradients of the slice.
            a, b: the tasks.
            fisher: F of the slice ``[k]``.
            lam: damping.
        """
        white = whitening(fisher, lam)
        for rows, first in loaded(a):
            for columns, second in loaded(b):
                for some in row_stretches(len(first), len(second), self.reader.memory_budget):
                    place = slice(rows.start + some.start, rows.start + some.stop)
                    yield self._stretch((a, place, first[some]), (b, columns, second), white)

    def _stretch(
        self, first: tuple[str, slice, Tensor], second: tuple[str, slice, Tensor], white: Tensor
    ) -> Stretch:
        (a, rows, left), (b, columns, right) = first, second
        found = product(self._form, left, right, white)
        # factors of samples go to the scores, of which there are fewer than entries
        scores, left_sums, right_sums = found.scores, found.left, found.right
        if (factors := self._left[a]) is not None:
            scores.mul_(factors[rows, None])
            left_sums.mul_(factors[rows])
        if (factors := self._right[b]) is not None:
            scores.mul_(factors[columns])
            right_sums.mul_(factors[columns])
        size = len(white)
        magnitude = None if self._form.signed else torch.outer(left_sums, right_sums).div_(size)
        if self.config.aggregate == "mean":
            scores.div_(size)
            if magnitude is not None:
                magnitude.div_(size)
        if (units := self._form.degree * self.reader.exponent) != 0:
            scores = scores.double() * 2.0**-units
            magnitude = None if magnitude is None else magnitude.double() * 2.0**-units
        stretch = Stretch(rows, columns, scores, magnitude)
        if a == b:
            stretch.blank_diagonal()
        return stretch
