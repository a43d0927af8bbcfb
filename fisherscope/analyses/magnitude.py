"""How large the gradients of a store are, and the power of two with which float32 can work on them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from fisherscope.errors import NotStoredError
from fisherscope.store import ContributionStore

# between 1e-12 and 1e12 products of several gradients, and of their squares, are far from float32's limits
_USUAL = 40


def unit_exponent(store: ContributionStore, tasks: Iterable[str] | None = None) -> int:
    """The exponent k with which gradients are multiplied by ``2 ** k`` before float32 works on them.

    One for all tasks that are compared, as scores depend on how their gradients relate. A power of two
    changes no digit, and with it the F of losses scaled by 1e-20 is as far from 0 as any other.

    Args:
        store: an open store.
        tasks: whose; all by default.

    Returns:
        0 for gradients of the usual size.
    """
    sizes = [_largest(store, task) for task in (store.tasks if tasks is None else tasks)]
    largest = max((size for size in sizes if 0 < size < math.inf), default=1.0)
    exponent = math.frexp(math.sqrt(largest))[1]
    return 0 if -_USUAL <= exponent <= _USUAL else -exponent


def _largest(store: ContributionStore, task: str) -> float:
    """The largest mean of h ** 2 over any group; 0 where nothing is stored."""
    size = store.group_table.frame()["size"].to_numpy()
    try:
        sums = store.aggregate(task, "moments/mean").numpy()
    except NotStoredError:
        sums = np.empty(0)
    if sums.shape != size.shape:
        sums = store.groups(task)["sum"].to_numpy()
    return float(np.nanmax(sums / size, initial=0.0))
