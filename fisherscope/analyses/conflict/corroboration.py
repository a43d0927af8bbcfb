"""Whether the most opposed pairs are too often across tasks, counting only pairs that share no sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Share of the stake that is bet on each pair being across. The best bet when one pair in 20 is within, which
# is what a false discovery rate of .05 looks like: (1 + .9) / 2 = .95.
_BET = 0.9
_MOST = 100


def corroboration(
    values: NDArray[np.float64],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    n_a: int,
    n_b: int,
) -> float:
    """Evidence, as an e-value, that extreme pairs lie across tasks rather than within them.

    The pairs are gone through from the lowest value, and one that shares a sample with an earlier one is
    passed over. Were the samples exchangeable between the tasks, each next pair would lie across with
    probability P = m_a m_b / C(m_a + m_b, 2), with m samples left of each task (at least 1/2 is taken, which
    is cautious for tasks of different size). Betting on "across" at fair odds, the capital is a test
    martingale, whatever the distribution of the values and however its tail looks; by Ville's inequality it
    reaches 1 / alpha with probability at most alpha (Shafer and Vovk 2019; signs are counted in the order of
    size as by Barber and Candes 2015).

    Args:
        values: of the extreme pairs, within and across tasks; the lowest is the most opposed.
        first, second: their samples; those of the second task are numbered from ``n_a``.
        n_a, n_b: samples of the tasks.

    Returns:
        The largest capital along the way, from 1 on. Five pairs across at the very top give about 23.
    """
    order = np.argsort(values, kind="stable")
    log = highest = 0.0
    left = [n_a, n_b]
    for i, j in _disjoint(first[order], second[order], n_a + n_b):
        n = sum(left)
        chance = max(0.5, left[0] * left[1] / (n * (n - 1) / 2))
        across = (i < n_a) != (j < n_a)
        log += np.log((1 + _BET) / (2 * chance)) if across else np.log((1 - _BET) / (2 * (1 - chance)))
        highest = max(highest, log)
        for sample in (i, j):
            left[int(sample >= n_a)] -= 1
        # with one sample left of each the next pair is across for certain
        if min(left) == 0 or sum(left) <= 2:
            break
    return float(np.exp(highest))


def sign_capital(below: NDArray[np.bool_]) -> float:
    """The same for signs that are independent, each below with probability of at most 1/2.

    Args:
        below: in the order in which they are bet on, of at most 100 the first.

    Returns:
        The largest capital along the way, from 1 on: about 25 for five below at the very top, 47 for six.
    """
    gains = np.where(below[:_MOST], np.log(1 + _BET), np.log(1 - _BET))
    return float(np.exp(np.cumsum(gains).max(initial=0.0)))


def _disjoint(first: NDArray[np.int64], second: NDArray[np.int64], samples: int) -> Iterator[tuple[int, int]]:
    """Pairs in order, without those that share a sample with an earlier one."""
    free = np.ones(samples, bool)
    for _ in range(_MOST):
        if not len(first):
            return
        i, j = int(first[0]), int(second[0])
        yield i, j
        free[[i, j]] = False
        kept = free[first] & free[second]
        first, second = first[kept], second[kept]
