"""What is told of all scores of one pair of tasks on one slice, and which pairs of samples stand out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fisherscope.analyses.interference.pairs import Stretch
from fisherscope.analyses.top import TopPairs

NUMBERS = ["mean", "sample_q95", "min", "max", "magnitude", "overlap"]


class Extremes:
    """The pairs of samples that stand out: the highest scores, or the largest by absolute value.

    Attributes:
        k: how many are kept.
    """

    def __init__(self, k: int, *, signed: bool) -> None:
        self.k = k
        self._highest = TopPairs(k)
        self._lowest = TopPairs(k) if signed else None

    def offer(self, stretch: Stretch, label: int) -> None:
        """Consider the scores of a stretch."""
        scores = (stretch.scores if stretch.reported is None else stretch.reported).numpy()
        start = {"first_row": stretch.rows.start, "first_column": stretch.columns.start}
        self._highest.offer(scores, label, **start)
        if self._lowest is not None:
            self._lowest.offer(-scores, label, **start)

    def found(self) -> list[tuple[float, int, int, int]]:
        """Score, label, row and column of each, those that stand out most first."""
        kept = [*zip(self._highest.scores.tolist(), self._highest.places.tolist(), strict=True)]
        if self._lowest is not None:
            lowest = zip((-self._lowest.scores).tolist(), self._lowest.places.tolist(), strict=True)
            # with few pairs the same one is among both
            kept = list({tuple(place): (score, place) for score, place in (*kept, *lowest)}.values())
            kept.sort(key=lambda one: (-abs(one[0]), one[1]))
        return [(score, *place) for score, place in kept[: self.k]]

    def lowest(self) -> list[tuple[float, int, int, int]]:
        """The same of the lowest scores below 0 alone: conflicts, where scores have a sign."""
        assert self._lowest is not None
        found = zip((-self._lowest.scores).tolist(), self._lowest.places.tolist(), strict=True)
        return [(score, *place) for score, place in found if score < 0]


class Totals:
    """Sums over stretches of M ``[n_a, n_b]``."""

    def __init__(self, n_a: int) -> None:
        self._sums = torch.zeros(n_a, dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(n_a, dtype=torch.float64, device="cpu")
        self._magnitude = 0.0
        self._overlap = 0.0
        self._split = False
        self._overlaps = 0
        self._low, self._high = float("inf"), float("-inf")

    def add(self, stretch: Stretch, *, same: bool) -> None:
        """Add a stretch; ``same`` where a task meets itself, so that some scores are NaN."""
        scores, rows = stretch.scores, stretch.rows
        if same:
            valid = ~scores.isnan()
            self._sums[rows] += scores.nansum(1, dtype=torch.float64)
            self._counts[rows] += valid.sum(1)
            seen = scores[valid]
        else:
            self._sums[rows] += scores.sum(1, dtype=torch.float64)
            self._counts[rows] += scores.shape[1]
            seen = scores
        if seen.numel():
            low, high = torch.aminmax(seen)
            self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        if stretch.magnitude is not None:
            self._add_split(scores, stretch.magnitude)

    def _add_split(self, scores: torch.Tensor, magnitude: torch.Tensor) -> None:
        self._split = True
        self._magnitude += float(magnitude.nansum(dtype=torch.float64))
        # 0 / 0 where a sample has no gradient there: it has no overlap
        ratio = scores / magnitude
        self._overlap += float(ratio.nansum(dtype=torch.float64))
        self._overlaps += int(ratio.numel() - ratio.isnan().sum())

    def numbers(self) -> dict[str, Any]:
        """``mean``, ``min`` and ``max`` over the pairs, ``sample_q95``, and the split.

        ``sample_q95`` is the 95 % quantile, over the first task's samples, of a sample's mean score: how much
        its most demanding samples lean on the slice. (The mean over all samples cannot tell: where F is the
        first task's own, their contributions relative to F average to 1.) The score of a pair is its
        magnitude, which it would be if both samples were spread evenly over the slice, times its overlap; the
        means over the pairs are ``magnitude`` and ``overlap``, NaN for signed forms.
        """
        nan = float("nan")
        pairs = float(self._counts.sum())
        if not pairs:
            return dict.fromkeys(NUMBERS, nan)
        samples = (self._sums / self._counts)[self._counts > 0].numpy()
        return {
            "mean": float(self._sums.sum()) / pairs,
            "sample_q95": float(np.quantile(samples, 0.95)),
            "min": self._low,
            "max": self._high,
            "magnitude": self._magnitude / pairs if self._split else nan,
            "overlap": self._overlap / self._overlaps if self._overlaps else nan,
        }

    @staticmethod
    def nothing() -> dict[str, Any]:
        """Of a pair of tasks of which one has no gradients: zeros."""
        return {**dict.fromkeys(NUMBERS, 0.0), "magnitude": float("nan"), "overlap": float("nan")}
