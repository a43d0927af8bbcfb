"""The signal part of F: what the mean gradient alone would give."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fisherscope.errors import NotStoredError
from fisherscope.layout import GroupTable
from fisherscope.store import ContributionStore


def group_signal(store: ContributionStore, task: str) -> NDArray[np.float64] | None:
    """``S = (mean_i h_i)^2`` summed over each group; F = S + N with N the population variance of h.

    Returns:
        ``[groups]`` in the order of the store, or None where mean gradients were not collected.
    """
    if store.header.fisher_shape != "full":
        return None
    table = GroupTable.build(store.layout, store.parameters)
    sums = torch.zeros(len(table), dtype=torch.float64, device="cpu")
    try:
        for name, members in table.members.items():
            square = store.mean(task, name).double().square_()[None]
            for member in members:
                if member.partition is None:
                    pieces = square.sum().reshape(1)
                else:
                    others = [d for d in range(1, square.dim()) if d != member.partition.axis + 1]
                    pieces = member.partition.sums(square.sum(others) if others else square)[0]
                sums[member.first : member.first + len(pieces)] += pieces
    except NotStoredError:
        return None
    return sums.numpy()
