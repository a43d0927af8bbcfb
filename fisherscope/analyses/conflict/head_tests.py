"""The pair test on every head slice, kept small: which pairs conflict somewhere, and in which heads."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fisherscope.analyses.conflict.corrections import Correction, adjust
from fisherscope.analyses.conflict.cosines import Blocks
from fisherscope.analyses.conflict.group_test import CauchySum, adjust_few
from fisherscope.analyses.conflict.inputs import differ
from fisherscope.analyses.conflict.pair_test import LEAST_SAMPLES, pair_test

Values = NDArray[np.float64]

# Bytes that one kept p-value takes: pair, slice, p, cosine and reference.
_KEPT_BYTES = 32


@dataclass(frozen=True)
class Called:
    """Pairs that conflict in some slice, and the slices.

    Attributes:
        p, q: of each pair, combined over the slices, ``[n_a, n_b]``.
        selected: how many pairs have q up to the level.
        row, column, slice: of each call inside the selected pairs.
        slice_p: of the call.
        slice_q: corrected over the slices of the pair and for having selected it: at most the level.
        cosine, reference: of the pair on the slice, and of samples of one task there.
    """

    p: Values
    q: Values
    selected: int
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    slice: NDArray[np.int64]
    slice_p: Values
    slice_q: Values
    cosine: Values
    reference: Values


@dataclass
class HeadTests:
    """Takes the cosines of one slice after the other; equal to ``group_test`` on all of them at once.

    Of the p-values of a slice those up to ``level`` are kept: inside a pair no other can be called. Where
    even these would not fit the budget, the bound is halved until they do, and fewer are called.

    Attributes:
        shape: samples of both tasks.
        level: false discovery rate.
        method: correction over pairs.
        budget: bytes for what is kept.
        tested: slices that were tested.
    """

    shape: tuple[int, int]
    level: float
    method: Correction
    budget: int
    tested: int = 0
    _slices: int = 0
    _reach: float = field(init=False)
    _sum: CauchySum = field(init=False)
    _kept: list[tuple[int, NDArray[np.int64], Values, Values, float]] = field(default_factory=list)
    _entries: int = 0

    def __post_init__(self) -> None:
        self._reach = self.level
        self._sum = CauchySum(self.shape)

    def take(self, blocks: Blocks) -> None:
        """Test one slice; pairs of a sample without a gradient there have p = 1."""
        number, self._slices = self._slices, self._slices + 1
        if not testable(blocks):
            return
        self.tested += 1
        p = blocks.spread(pair_test(blocks.cross, blocks.within_a, blocks.within_b), fill=1.0)
        self._sum.add(p)
        places = np.flatnonzero(p <= self._reach)
        cosine = blocks.spread(blocks.cross, fill=np.nan).ravel()[places]
        self._kept.append((number, places, p.ravel()[places], cosine, blocks.reference))
        self._entries += len(places)
        while self._entries * _KEPT_BYTES > self.budget and self._entries:
            self._narrow()

    @property
    def bound(self) -> float | None:
        """The largest p-value of a slice that was kept, where memory was short; else None."""
        return self._reach if self._reach < self.level else None

    def _narrow(self) -> None:
        self._reach /= 2
        kept = [(n, places, p, cosine, r, p <= self._reach) for n, places, p, cosine, r in self._kept]
        self._kept = [(n, places[k], p[k], cosine[k], r) for n, places, p, cosine, r, k in kept]
        self._entries = sum(len(places) for _, places, *_ in self._kept)

    def called(self) -> Called | None:
        """What was found; None where no slice could be tested."""
        if not self.tested:
            return None
        p = self._sum.combined()
        q = adjust(p, self.method)
        selected = (q <= self.level).ravel()
        count = int(selected.sum())
        parts = []
        for number, places, p_small, cosine, reference in self._kept:
            inside = selected[places]
            one = np.ones(int(inside.sum()))
            parts.append((places[inside], number * one, p_small[inside], cosine[inside], reference * one))
        places, slices, values, cosines, references = map(np.concatenate, zip(*parts, strict=True))
        # having looked for the pairs must be paid for: level x selected / all
        paid = adjust_few(places, values, self.tested) * selected.size / max(count, 1)
        slice_q = np.maximum(paid, q.ravel()[places])
        keep = slice_q <= self.level
        order = np.lexsort([slices[keep], values[keep], places[keep]])
        row, column = np.divmod(places[keep][order], self.shape[1])
        where = slices[keep][order].astype(np.int64)
        found = (values, slice_q, cosines, references)
        return Called(p, q, count, row, column, where, *(part[keep][order] for part in found))


def testable(blocks: Blocks) -> bool:
    """Whether the pair test applies: enough samples, and not all copies of one."""
    return blocks.smallest >= LEAST_SAMPLES and differ(blocks.within_a, blocks.within_b)
