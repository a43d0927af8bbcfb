"""Keeping an exact number of the highest scores, with ties broken by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherscope.errors import UsageError

_HALF = 1 << 16


def keep_count(total: int, sparsity: float) -> int:
    """How many of ``total`` units stay: all but ``sparsity * total``, halves removed."""
    return total - math.floor(sparsity * total + 0.5)


def keep_top(scores: NDArray[np.float64], keep: int) -> NDArray[np.bool_]:
    """Mask of the ``keep`` highest scores; among equal ones the first stay.

    Masks of fewer are contained in masks of more.
    """
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:keep]] = True
    return mask


@dataclass(frozen=True)
class Threshold:
    """Cut through non-negative float32 scores: those above stay, and the first ``ties`` that equal it.

    Attributes:
        bits: the score at the cut, as the integer with its bits (their order is that of the floats).
        ties: how many scores equal to it stay, in order of position.
    """

    bits: int
    ties: int

    @property
    def value(self) -> float:
        """The score at the cut."""
        return float(np.array(self.bits, np.uint32).view(np.float32))

    def apply(self, scores: NDArray[np.float32], seen: int) -> tuple[NDArray[np.bool_], int]:
        """Mask of one stretch of the scores.

        Args:
            scores: any shape.
            seen: scores equal to the threshold in the stretches before.

        Returns:
            The mask, in the shape of ``scores``, and ``seen`` for the next stretch.
        """
        bits = _bits(scores)
        mask = bits > self.bits
        equal = np.flatnonzero(bits == self.bits)
        mask[equal[: max(0, self.ties - seen)]] = True
        return mask.reshape(scores.shape), seen + len(equal)


def thresholds(
    stretches: Callable[[], Iterable[NDArray[np.float32]]], keeps: Sequence[int]
) -> list[Threshold]:
    """Thresholds that keep exactly so many of all scores, without holding them all.

    Two passes of a radix selection: a histogram of the upper 16 bits, then one of the lower 16 bits in
    the bin where each cut falls.

    Args:
        stretches: yields the scores, the same at each call; non-negative float32, any shapes.
        keeps: how many to keep; one threshold each.

    Raises:
        ValueError: a score is negative or not finite.
    """
    upper = np.zeros(_HALF, np.int64)
    for scores in stretches():
        if not np.isfinite(scores).all() or (scores < 0).any():
            raise UsageError("scores to rank must be finite and not negative: the stored Fisher is damaged")
        upper += np.bincount(_bits(scores) >> 16, minlength=_HALF)
    places = [_place(upper, keep) for keep in keeps]
    lower = {high: np.zeros(_HALF, np.int64) for high, _ in places}
    for scores in stretches():
        bits = _bits(scores)
        for high in lower:
            lower[high] += np.bincount(bits[(bits >> 16) == high] & (_HALF - 1), minlength=_HALF)
    cuts = []
    for high, wanted in places:
        low, ties = _place(lower[high], wanted)
        cuts.append(Threshold(high << 16 | low, ties))
    return cuts


def _bits(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    # adding zero turns -0.0, whose bits would sort above everything, into 0.0
    return (np.asarray(scores, np.float32).reshape(-1) + np.float32(0)).view(np.uint32)


def _place(histogram: NDArray[np.int64], keep: int) -> tuple[int, int]:
    """Bin in which the last of the ``keep`` highest falls, and how many of that bin stay."""
    above = np.cumsum(histogram[::-1])
    found = int(np.searchsorted(above, keep)) if keep else 0
    found = min(found, len(above) - 1)
    bin_ = len(histogram) - 1 - found
    return bin_, keep - int(above[found] - histogram[bin_])
