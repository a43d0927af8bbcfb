"""Each sample of two tasks against the other task as a whole, and against its own task beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fisherscope.analyses.conflict.corrections import Correction, adjust
from fisherscope.analyses.conflict.corroboration import sign_capital
from fisherscope.analyses.conflict.cosines import Blocks
from fisherscope.analyses.conflict.sample_test import sample_test, varies

Values = NDArray[np.float64]

# With fewer columns, samples of a task that fall into classes (labels of a softmax) are no normal spread.
FEWEST_COLUMNS = 20
# Capital from which on opposed samples are more than one side of a symmetric spread: 1 / .025, twice.
_CORROBORATED = 40.0


@dataclass(frozen=True)
class SampleTests:
    """The samples of one task against the other one.

    Attributes:
        mean: mean cosine with the other task ``[n]``; NaN where the sample has no gradient.
        own: mean cosine with the other samples of its own task ``[n]``.
        p: one-sided, of opposing the other task, and that more than its own; NaN where nothing was tested.
        q: corrected over the samples of both tasks and both directions.
        direction: -1 where the sample is called to oppose the other task, 1 where it agrees with it, else 0.
        corroborated: whether opposed samples are more than one half of a symmetric spread around the median.
            If not, they are a sign of a conflict of the tasks only where the tasks' mean is one.
    """

    mean: Values
    own: Values
    p: Values
    q: Values
    direction: NDArray[np.int64]
    corroborated: bool


@dataclass(frozen=True)
class _Side:
    """The samples with a gradient of one task."""

    kept: NDArray[np.bool_]
    cross: Values
    within: Values

    @property
    def mean(self) -> Values:
        return self.cross.mean(1) if self.cross.size else np.full(len(self.cross), np.nan)

    @property
    def own(self) -> Values:
        n = len(self.within)
        # the cosine of a sample with itself is 1
        return (self.within.sum(1) - 1) / (n - 1) if n > 1 else np.full(n, np.nan)

    def one_sided(self) -> tuple[Values, Values]:
        """P of opposing, and of agreeing; NaN where the row does not vary."""
        if min(self.cross.shape[1], len(self.within) - 1) < FEWEST_COLUMNS:
            return (np.full(len(self.cross), np.nan),) * 2
        below = sample_test(self.cross)
        opposing = np.maximum(below, self._below_own())
        known = varies(self.cross)
        return np.where(known, opposing, np.nan), np.where(known, 1 - below, np.nan)

    def _below_own(self) -> Values:
        """Welch's t-test: is the mean cosine with the other task below that with its own?"""
        n = len(self.within)
        own = self.within[~np.eye(n, dtype=bool)].reshape(n, n - 1)
        return np.asarray(
            stats.ttest_ind(self.cross, own, axis=1, equal_var=False, alternative="less").pvalue
        )

    def corroborated(self) -> bool:
        """Whether the samples that are farthest from the middle are opposed more often than a coin has it."""
        mean = self.mean
        if not len(mean):
            return False
        # where the tasks oppose each other on average that is for the test of means to say
        rest = mean - float(np.median(mean))
        order = np.argsort(-np.abs(rest), kind="stable")
        return sign_capital(rest[order] < 0) >= _CORROBORATED


def samples_against_tasks(
    blocks: Blocks, level: float, method: Correction, least_excess: float
) -> tuple[SampleTests, SampleTests]:
    """Test the samples of both tasks, corrected together.

    A sample is called to oppose the other task only if its mean cosine with that task is below 0 *and* below
    that with its own task: what it does to everybody, such as a sample of a rare label, is no conflict of
    tasks. The larger p counts (Berger 1982, intersection-union).

    Args:
        blocks: cosines.
        level: false discovery rate.
        method: correction.
        least_excess: samples are called to oppose only with a mean at least so far below that of their own
            task; it filters, and changes no p or q.

    Returns:
        One for each task. Nothing is tested with fewer than 20 columns.
    """
    sides = [
        _Side(blocks.kept_a, blocks.cross, blocks.within_a),
        _Side(blocks.kept_b, blocks.cross.T, blocks.within_b),
    ]
    p = [side.one_sided() for side in sides]
    opposing, agreeing = (np.concatenate(parts) for parts in zip(*p, strict=True))
    q = np.full(len(opposing), np.nan)
    if (known := ~np.isnan(opposing)).any():
        q[known] = adjust(np.minimum(2 * np.minimum(opposing, agreeing)[known], 1), method)
    direction = np.where(q <= level, np.where(opposing < agreeing, -1, 1), 0)
    found, start = [], 0
    for side in sides:
        here = slice(start, start + len(side.cross))
        start = here.stop
        signs = direction[here]
        signs[(signs < 0) & (side.mean - side.own > -least_excess)] = 0
        found.append(_of_all(side, opposing[here], q[here], signs))
    return found[0], found[1]


def _of_all(side: _Side, p: Values, q: Values, direction: NDArray[np.int64]) -> SampleTests:
    """Numbers of the samples with a gradient, as those of all samples of a task."""

    def full(values: Values) -> Values:
        found = np.full(len(side.kept), np.nan)
        found[side.kept] = values
        return found

    signs = np.zeros(len(side.kept), np.int64)
    signs[side.kept] = direction
    return SampleTests(full(side.mean), full(side.own), full(p), full(q), signs, side.corroborated())
