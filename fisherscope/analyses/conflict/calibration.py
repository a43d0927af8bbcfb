"""Do the tests keep their promise on this store? Random halves of one task, where nothing is to be found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from fisherscope.analyses.conflict.block_test import block_test
from fisherscope.analyses.conflict.corrections import Correction, adjust
from fisherscope.analyses.conflict.cosines import cosines
from fisherscope.analyses.conflict.group_test import CauchySum
from fisherscope.analyses.conflict.inputs import differ
from fisherscope.analyses.conflict.pair_test import LEAST_SAMPLES, pair_test
from fisherscope.words import counted

Values = NDArray[np.float64]

COLUMNS = ["test", "splits", "rejecting", "upper", "chance", "calibrated", "samples"]
HISTOGRAM = ["test", "low", "high", "count"]

# From this probability on as many rejecting splits are taken for chance.
_DOUBT = 0.05
# The test of heads runs the pair test on every slice and split: with all of them, and with more samples, it
# would take longer than all else.
_MOST_PER_SLICE = 64
_SHARE_OF_SPLITS = 0.5
_BINS = 20
_EDGES = np.linspace(0, 1, _BINS + 1)


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
    def upper(self) -> float:
        """Upper 95 % bound of the share of splits in which it calls something (Clopper and Pearson 1934)."""
        if self.rejecting == self.splits:
            return 1.0
        return float(stats.beta.ppf(0.95, self.rejecting + 1, self.splits - self.rejecting))

    @property
    def withheld(self) -> bool:
        """Whether its q-values must not be shown."""
        return self.chance < _DOUBT

    @property
    def calibrated(self) -> bool | None:
        """Whether nothing speaks against its q-values; None where it was not tried."""
        return not self.withheld if self.splits else None

    def __str__(self) -> str:
        if not self.splits:
            return f"the test of {self.test} could not be tried on random halves: there are too few samples"
        told = (
            f"the test of {self.test} called something in {self.rejecting} of "
            f"{counted(self.splits, 'random split')} of single tasks, where nothing is to be found"
        )
        if self.withheld:
            return (
                f"{told}: so many have a probability of {self.chance:.2g} if q-values held what they "
                "promise, so they are withheld. (The splits share samples, and a side has half of a task's)"
            )
        if stats.binom.sf(self.splits - 1, self.splits, self.level) >= _DOUBT:
            return f"{told}; so few splits can show nothing"
        return f"{told} (at most {self.upper:.0%} of splits, with 95 % confidence)"


@dataclass
class _Tried:
    """P-values of one test, split by split, of which the bins alone are kept."""

    splits: int = 0
    rejecting: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def note(self, p: Values, level: float, method: Correction) -> None:
        """Add the p-values of a split."""
        self.splits += 1
        self.rejecting += bool((adjust(p, method) <= level).any())
        self.counts += np.histogram(p, bins=_EDGES)[0]


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

    def __post_init__(self) -> None:
        sides = [
            (min(len(half.first), _MOST_PER_SLICE), min(len(half.second), _MOST_PER_SLICE))
            for half in self.halves
        ]
        self._pairs = _Tried()
        self._sums = [CauchySum(side) for side in sides[: math.ceil(_SHARE_OF_SPLITS * len(sides))]]
        self._tested = [0] * len(self._sums)
        self._blocks: list[list[float]] = [[] for _ in self.halves]

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
                self._blocks[split].append(float(p))
            if split < len(self._sums):
                self._take_heads(split, half, cosine)

    def _take_heads(self, split: int, half: Half, cosine: Values) -> None:
        parts = half.cosines(cosine, _MOST_PER_SLICE)
        shape = self._sums[split].shape
        # where samples have no gradient, pairs of others would be combined
        if parts[0].shape == shape and differ(*parts[1:]):
            self._sums[split].add(pair_test(*parts))
            self._tested[split] += 1

    def take_whole(self, gram: Values) -> None:
        """Try the test of pairs."""
        if not self.halves:
            return
        cosine = cosines(gram)
        for half in self.halves:
            parts = half.cosines(cosine)
            if min(parts[0].shape) >= LEAST_SAMPLES and differ(*parts[1:]):
                self._pairs.note(pair_test(*parts).ravel(), self.level, self.method)

    @cached_property
    def _tried(self) -> dict[str, _Tried]:
        """What came of each test; to be asked for when all has been taken."""
        heads, blocks = _Tried(), _Tried()
        for total, tested in zip(self._sums, self._tested, strict=True):
            if tested:
                heads.note(total.combined().ravel(), self.level, self.method)
        for p in self._blocks:
            if p:
                blocks.note(np.array(p), self.level, self.method)
        return {"pairs": self._pairs, "heads": heads, "blocks": blocks}

    def verdicts(self) -> list[Verdict]:
        """One for each test, when all has been taken."""
        samples = min((min(len(half.first), len(half.second)) for half in self.halves), default=0)
        found = []
        for test, tried in self._tried.items():
            most = min(samples, _MOST_PER_SLICE) if test == "heads" else samples
            found.append(Verdict(test, tried.splits, tried.rejecting, self.level, most))
        return found

    def histogram(self) -> pd.DataFrame:
        """The p-values of all splits in bins: columns test, low, high, count."""
        frames = [
            pd.DataFrame({"test": test, "low": _EDGES[:-1], "high": _EDGES[1:], "count": tried.counts})
            for test, tried in self._tried.items()
        ]
        return pd.concat(frames, ignore_index=True)[HISTOGRAM]

    def frame(self) -> pd.DataFrame:
        """The verdicts: columns test, splits, rejecting, upper, chance, calibrated, samples."""
        rows = [{name: getattr(verdict, name) for name in COLUMNS} for verdict in self.verdicts()]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"calibrated": object})
