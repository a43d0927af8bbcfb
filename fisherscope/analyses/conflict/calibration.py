"""Do the tests keep their promise on this store? Random halves of one task, where nothing is to be found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from fisherscope.analyses.conflict.block_test import block_test
from fisherscope.analyses.conflict.corrections import Correction, adjust
from fisherscope.analyses.conflict.cosines import cosines
from fisherscope.analyses.conflict.group_test import CauchySum
from fisherscope.analyses.conflict.pair_test import LEAST_SAMPLES, pair_test

Values = NDArray[np.float64]

TESTS = ("pairs", "heads", "blocks")
COLUMNS = ["test", "splits", "rejecting", "chance", "calibrated", "samples"]
HISTOGRAM = ["test", "low", "high", "count"]

# From this probability on as many rejecting splits are taken for chance.
_DOUBT = 0.05
# The test of heads runs the pair test on every slice and split: with all of them, and with more samples, it
# would take longer than all else.
_MOST_PER_SLICE = 64
_SHARE_OF_SPLITS = 0.5
_BINS = 20


@dataclass(frozen=True)
class Half:
    """One split: two disjoint sets of samples of one task.

    Attributes:
        first, second: their places in the Gram matrix.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]

    def cosines(self, cosine: Values, most: int | None = None) -> tuple[Values, Values, Values]:
        """Across and within both halves, without the samples that have no gradient."""
        a, b = (self._present(cosine, part, most) for part in (self.first, self.second))
        return cosine[np.ix_(a, b)], cosine[np.ix_(a, a)], cosine[np.ix_(b, b)]

    def cross(self, cosine: Values) -> Values:
        """Those across alone."""
        a, b = (self._present(cosine, part, None) for part in (self.first, self.second))
        return cosine[np.ix_(a, b)]

    @staticmethod
    def _present(cosine: Values, part: NDArray[np.int64], most: int | None) -> NDArray[np.int64]:
        return part[~np.isnan(cosine[part, part])][:most]


@dataclass(frozen=True)
class Verdict:
    """What the splits say of one test.

    Attributes:
        test: "pairs" (over the whole), "heads" (pairs, combined over slices) or "blocks" (means of slices).
        splits: how many there were.
        rejecting: in how many the test called anything, corrected for all that it asked.
        level: in what share of them it may.
        samples: on each side of a split.
    """

    test: str
    splits: int
    rejecting: int
    level: float
    samples: int

    @property
    def chance(self) -> float:
        """P(Bin(splits, level) >= rejecting): of so many rejections if the test keeps its level."""
        return float(stats.binom.sf(self.rejecting - 1, self.splits, self.level)) if self.splits else 1.0

    @property
    def calibrated(self) -> bool:
        """Whether its q-values may be shown."""
        return self.chance >= _DOUBT

    def __str__(self) -> str:
        if not self.splits:
            return f"the test of {self.test} could not be tried on random halves: there are too few samples"
        told = (
            f"the test of {self.test} called something in {self.rejecting} of {self.splits} random splits of "
            "single tasks, where nothing is to be found"
        )
        if self.calibrated:
            return told
        return (
            f"{told}: so many have a probability of {self.chance:.2g} if q-values held what they promise, so "
            "they are withheld. (The splits share samples, and a side has half of a task's)"
        )


@dataclass
class Calibration:
    """Tries the tests on splits of single tasks, as Gram matrices come by.

    Under the null hypothesis that is true here, samples of both halves being draws of one task, a test at
    level q should call something in a share of at most q of the splits. The splits share samples, so that
    they are not independent, and a half has n / 2 samples: heavy tails that only show at n may escape.
    The test of heads, which takes longest, is tried on half of the splits, with at most 64 samples a side.

    Attributes:
        halves: the splits.
        level: false discovery rate.
        method: correction.
    """

    halves: list[Half]
    level: float
    method: Correction
    _p: dict[str, list[list[Values]]] = field(init=False)
    _sums: list[CauchySum] = field(init=False)

    def __post_init__(self) -> None:
        self._p = {test: [[] for _ in self.halves] for test in TESTS}
        sides = [
            (min(len(h.first), _MOST_PER_SLICE), min(len(h.second), _MOST_PER_SLICE)) for h in self.halves
        ]
        tried = math.ceil(_SHARE_OF_SPLITS * len(sides))
        self._sums = [CauchySum(side) for side in sides[:tried]]
        self._tested = [0] * tried

    @classmethod
    def draw(
        cls, counts: tuple[int, ...], splits: int, level: float, method: Correction, rng: np.random.Generator
    ) -> Calibration:
        """Split the tasks in turn.

        Args:
            counts: samples of each task, in the order of the Gram matrix.
            splits: how many in all.
            level: false discovery rate.
            method: correction.
            rng: draws them.
        """
        starts = np.cumsum([0, *counts])
        usable = [k for k, count in enumerate(counts) if count >= 2 * LEAST_SAMPLES]
        halves = []
        for split in range(splits if usable else 0):
            task = usable[split % len(usable)]
            order = starts[task] + rng.permutation(counts[task])
            middle = counts[task] // 2
            halves.append(Half(order[:middle], order[middle:]))
        return cls(halves, level, method)

    def take_slice(self, gram: Values, margin: float) -> None:
        """Try the tests of heads and of blocks on one slice, the latter against a margin."""
        if not self.halves:
            return
        cosine = cosines(gram)
        for split, half in enumerate(self.halves):
            cross = half.cross(cosine)
            if min(cross.shape) > 1:
                _, p = block_test(cross, margin=0.0 if np.isnan(margin) else margin)
                self._p["blocks"][split].append(np.atleast_1d(p))
            if split < len(self._sums):
                self._take_heads(split, half, cosine)

    def _take_heads(self, split: int, half: Half, cosine: Values) -> None:
        parts = half.cosines(cosine, _MOST_PER_SLICE)
        shape = self._sums[split].shape
        # where samples have no gradient, pairs of others would be combined
        if parts[0].shape == shape and _differ(parts):
            self._sums[split].add(pair_test(*parts))
            self._tested[split] += 1

    def take_whole(self, gram: Values) -> None:
        """Try the test of pairs."""
        if not self.halves:
            return
        cosine = cosines(gram)
        for split, half in enumerate(self.halves):
            parts = half.cosines(cosine)
            if min(parts[0].shape) >= LEAST_SAMPLES and _differ(parts):
                self._p["pairs"][split].append(pair_test(*parts).ravel())

    def verdicts(self) -> list[Verdict]:
        """One for each test."""
        return [self._verdict(test) for test in TESTS]

    def histogram(self) -> pd.DataFrame:
        """The p-values of all splits in bins: columns test, low, high, count."""
        edges = np.linspace(0, 1, _BINS + 1)
        frames = []
        for test in TESTS:
            values = self._values(test)
            counts, _ = np.histogram(np.concatenate(values) if values else [], bins=edges)
            frames.append(pd.DataFrame({"test": test, "low": edges[:-1], "high": edges[1:], "count": counts}))
        return pd.concat(frames, ignore_index=True)[HISTOGRAM]

    def frame(self) -> pd.DataFrame:
        """The verdicts: columns test, splits, rejecting, chance, calibrated, samples."""
        rows = [{**vars(v), "chance": v.chance, "calibrated": v.calibrated} for v in self.verdicts()]
        return pd.DataFrame(rows, columns=COLUMNS)

    def _verdict(self, test: str) -> Verdict:
        values = self._values(test)
        rejecting = sum(bool((adjust(p, self.method) <= self.level).any()) for p in values)
        sides = [min(len(half.first), len(half.second)) for half in self.halves]
        samples = min(sides, default=0)
        most = min(samples, _MOST_PER_SLICE) if test == "heads" else samples
        return Verdict(test, len(values), rejecting, self.level, most)

    def _values(self, test: str) -> list[Values]:
        """All p-values of each split in which the test could be tried."""
        if test == "heads":
            pairs = zip(self._sums, self._tested, strict=True)
            return [total.combined().ravel() for total, tested in pairs if tested]
        return [np.concatenate(parts) for parts in self._p[test] if parts]


def _differ(parts: tuple[Values, Values, Values]) -> bool:
    """Whether the samples of both halves are more than copies of one."""
    return all(within.min() < 1 - 1e-9 for within in parts[1:])
