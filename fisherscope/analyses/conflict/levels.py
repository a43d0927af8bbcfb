"""What is told of two tasks at one slice, block, layer, or over the whole: means, variance, and a test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fisherscope.analyses.conflict.block_test import block_test
from fisherscope.analyses.conflict.clustering import different_cluster_mean
from fisherscope.analyses.conflict.cosines import Blocks

NAN = float("nan")


@dataclass(frozen=True)
class Level:
    """Cosines of a pair of tasks at one place.

    Attributes:
        mean, min: over the pairs of samples across tasks.
        share_negative: share of these pairs below 0.
        reference: mean cosine of different samples of one task, averaged over both tasks.
        undefined: share of the pairs without a cosine, because a sample has no gradient there.
        margin: what the mean is tested against is -margin.
        t, p: one-sided test of a mean below -margin
            (:func:`~fisherscope.analyses.conflict.block_test.block_test`); NaN with a single sample.
    """

    mean: float
    min: float
    share_negative: float
    reference: float
    undefined: float
    margin: float
    t: float
    p: float

    @property
    def excess(self) -> float:
        """How much less aligned (negative) samples of both tasks are than samples of one task."""
        return self.mean - self.reference

    @property
    def variance_within(self) -> float:
        """Variance of unit gradients within a task, averaged over both: E |u - E u|^2 = 1 - reference."""
        return 1 - self.reference

    @property
    def variance_between(self) -> float:
        """Variance of the tasks' mean unit gradients: |E u - E v|^2 / 2 = reference - mean, without bias."""
        return self.reference - self.mean

    def row(self) -> dict[str, float]:
        """All numbers by name."""
        names = ("excess", "variance_within", "variance_between")
        return {**vars(self), **{name: getattr(self, name) for name in names}}

    @classmethod
    def of(cls, blocks: Blocks, margin: float | None) -> Level:
        """Summary and test; with ``margin`` None against :func:`own_margin`."""
        cross, reference = blocks.cross, blocks.reference
        if not cross.size:
            return cls(NAN, NAN, NAN, reference, 1.0, NAN, NAN, NAN)
        undefined = 1 - cross.size / (len(blocks.kept_a) * len(blocks.kept_b))
        t = p = held = NAN
        if blocks.smallest > 1:
            held = own_margin(blocks) if margin is None else margin
            t, p = (float(value) for value in block_test(cross, margin=held))
        share = np.count_nonzero(cross < 0) / cross.size
        return cls(float(cross.mean()), float(cross.min()), share, reference, undefined, held, t, p)


def own_margin(blocks: Blocks) -> float:
    """How far below 0 the mean cosine of different clusters of *one* task is, in the task where it is lowest.

    Labels of a softmax compete, so that groups of samples of one task have small negative means, too: tasks
    are in conflict where they oppose each other more than that.
    """
    means = [different_cluster_mean(within) for within in (blocks.within_a, blocks.within_b)]
    return max([0.0, *(-mean for mean in means if not np.isnan(mean))])
