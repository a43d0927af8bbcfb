"""Pairs of samples in many groups of parameters: which pairs conflict, and in which heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherscope.analyses.conflict.corrections import Correction, adjust
from fisherscope.analyses.conflict.inputs import finite
from fisherscope.errors import UsageError

Values = NDArray[np.float64]

_SMALLEST, _LARGEST = 1e-300, 0.99


def cauchy_combination(p: ArrayLike, axis: int = 0) -> Values:
    """One p-value out of several, however they depend on each other in the far tail.

    T = mean of tan((1/2 - p) pi), p = 1/2 - arctan(T) / pi (Liu and Xie 2020, with equal weights): small when
    one of them is very small, and close to valid there under dependence. Values above .99 count as .99: a
    single one near 1 would outweigh all others (Fang, Chang, Park and Tseng 2023, truncated Cauchy test).

    Args:
        p: p-values in [0, 1].
        axis: the axis of the groups.

    Returns:
        p without that axis, in (0, 1].

    Raises:
        ValueError: p outside [0, 1] or NaN, or no groups.
    """
    values = np.asarray(p, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise UsageError("p-values must be numbers between 0 and 1")
    if not values.size:
        raise UsageError(f"there are no p-values to combine in an array of shape {values.shape}")
    return _tail_of(np.mean(_cotangent(values), axis=axis))


class CauchySum:
    """:func:`cauchy_combination` of groups that come one after the other."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """For p-values of this shape in each group."""
        self.shape = shape
        self._total = np.zeros(shape)
        self._groups = 0

    def add(self, p: Values) -> None:
        """Add the p-values of a group."""
        self._total += _cotangent(p)
        self._groups += 1

    def combined(self) -> Values:
        """One p-value over all groups so far, in (0, 1]."""
        return _tail_of(self._total / self._groups)


def _cotangent(p: Values) -> Values:
    return np.asarray(1 / np.tan(np.pi * p.clip(_SMALLEST, _LARGEST)))


def _tail_of(mean: Values) -> Values:
    # arctan(1 / T) / pi is 1/2 - arctan(T) / pi without cancellation
    combined = np.where(mean > 0, np.arctan2(1, mean), np.pi - np.arctan2(1, -mean)) / np.pi
    return np.asarray(np.clip(combined, _SMALLEST, 1))


@dataclass(frozen=True)
class GroupTest:
    """Pairs first, then groups inside the pairs that were selected.

    Attributes:
        p: combined over the groups, ``[n_a, n_b]``.
        q: of the pairs, corrected over all of them, ``[n_a, n_b]``.
        selected: pairs with q <= level, ``[n_a, n_b]``.
        within_q: of each group, corrected over the groups of its pair, ``[groups, n_a, n_b]``.
        within_level: what ``within_q`` is held against: level R / m, with R of m pairs selected.
        rejected: groups of the selected pairs with ``within_q`` <= ``within_level``, ``[groups, n_a, n_b]``.
    """

    p: Values
    q: Values
    selected: NDArray[np.bool_]
    within_q: Values
    within_level: float
    rejected: NDArray[np.bool_]


def group_test(p: ArrayLike, *, level: float = 0.05, method: Correction = "bh") -> GroupTest:
    """Which pairs conflict somewhere, and in which groups (head slices, blocks, layers).

    Null hypothesis of a pair, in words: it is in conflict in no group; of a group inside a pair: not in this
    one. Pairs are tested by the Cauchy combination of their groups, corrected over pairs. Inside selected
    pairs groups are tested at level R / m instead of level, which keeps the false share, averaged over the
    selected pairs, at level: selection must be paid for (Benjamini and Bogomolov 2014).
    A flat list of all pairs and groups is ``adjust(p)`` itself: simpler, with less power for pairs.

    Args:
        p: of :func:`~fisherscope.analyses.conflict.pair_test.pair_test` on the Gram matrices of each group,
            ``[groups, n_a, n_b]``.
        level: false discovery rate, in (0, 1).
        method: correction over the pairs.

    Returns:
        A :class:`GroupTest`.

    Raises:
        ValueError: wrong shape, p outside [0, 1] or NaN, level outside (0, 1).
    """
    values = finite("p", p, dimensions=(3,))
    if not 0 < level < 1:
        raise UsageError(f"level is {level}; a false discovery rate lies between 0 and 1")
    combined = cauchy_combination(values)
    q = adjust(combined, method)
    selected = q <= level
    within = _adjust_groups(values)
    within_level = level * np.count_nonzero(selected) / max(selected.size, 1)
    return GroupTest(combined, q, selected, within, within_level, selected & (within <= within_level))


def _adjust_groups(p: Values) -> Values:
    """BH along the first axis, for all pairs at once."""
    groups = len(p)
    order = np.argsort(p, axis=0, kind="stable")
    ranks = np.arange(1, groups + 1).reshape(-1, *[1] * (p.ndim - 1))
    level = np.take_along_axis(p, order, 0) * groups / ranks
    level = np.minimum.accumulate(level[::-1], axis=0)[::-1].clip(max=1)
    q = np.empty_like(level)
    np.put_along_axis(q, order, level, 0)
    return q


def adjust_few(pair: NDArray[np.int64], p: Values, groups: int) -> Values:
    """BH over the groups of each pair, given its smallest p-values only.

    Exact up to the largest p-value that is given of a pair: those that are left out are larger, and so are
    their q-values.

    Args:
        pair: number of the pair that each p-value belongs to, ``[m]``.
        p: the p-values ``[m]``.
        groups: p-values that each pair has, those left out included.

    Returns:
        q ``[m]``, at most 1.
    """
    order = np.lexsort([p, pair])
    first = np.flatnonzero(np.diff(pair[order], prepend=-1))
    sizes = np.diff(np.append(first, len(pair)))
    ranks = np.arange(len(pair)) - np.repeat(first, sizes) + 1
    level = np.minimum(p[order] * groups / ranks, 1)
    # one row for each pair: the running minimum from its far end
    table = np.ones((len(first), int(sizes.max(initial=0))))
    row = np.repeat(np.arange(len(first)), sizes)
    table[row, ranks - 1] = level
    table = np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    q = np.empty_like(p)
    q[order] = table[row, ranks - 1]
    return q
