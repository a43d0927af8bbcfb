"""Reading the contributions of single positions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.errors import NotStoredError
from fisherscope.store import lookup
from fisherscope.store.index import TaskIndex
from fisherscope.store.opened import OpenStore
from fisherscope.store.tables import ragged


def read_contributions(
    store: OpenStore,
    index: TaskIndex,
    parameter: str,
    chosen: NDArray[np.int64],
    block: str | None,
) -> list[Tensor]:
    """Per sample ``[positions]``, or ``[heads, positions]`` of a block.

    Raises:
        KeyError: the model has no such parameter, or the parameter no such block.
        NotStoredError: contributions to it are not stored.
    """
    if lookup.known(store.header, parameter) not in store.header.position_parameters:
        raise NotStoredError(
            f"the store holds no position contributions of {parameter!r}: collect again with "
            f"extensions=(..., Positions(parameters=[..., {parameter!r}]))"
        )
    dataset = store.header.positions.datasets[parameter]
    heads = None if block is None else dataset.heads(block)
    found: dict[int, Tensor] = {}
    for chunk in index.chunks(chosen):
        each = ragged(store, chunk, dataset.family, dataset.name, "float32", (dataset.columns,))
        for target, values in zip(chunk.targets.tolist(), each, strict=True):
            columns = torch.from_numpy(values)
            found[target] = (columns[:, 0] if heads is None else columns[:, heads].T).contiguous()
    return [found[place] for place in range(len(chosen))]
