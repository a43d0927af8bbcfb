"""Masks of single weights by full-shape F, without holding all of F."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.analyses.magnitude import unit_exponent
from fisherscope.analyses.selection import Threshold, keep_count, thresholds
from fisherscope.layout import ParameterInfo
from fisherscope.store import ContributionStore

# Packed masks may take this share of the memory budget; beyond it they are made from F when asked for.
_SHARE = 4

Key = tuple[str, float, str]


@dataclass
class UnstructuredMasks:
    """Which weights stay, per task, sparsity and parameter.

    The cut through F is always kept, the bits of the masks only where they fit the memory budget.

    Attributes:
        store: where F is read from when the bits are not kept.
        parameters: the weights that are ranked, in model order.
        cuts: threshold and equal scores seen before, per task, sparsity and parameter.
        counts: weights kept, likewise.
        packed: the masks as bits (numpy's ``packbits``), or empty.
        exponents: of the powers of two by whose squares F of a task is multiplied, as far as they are known.
    """

    store: ContributionStore
    parameters: tuple[ParameterInfo, ...]
    cuts: dict[Key, tuple[Threshold, int]] = field(default_factory=dict)
    counts: dict[Key, int] = field(default_factory=dict)
    packed: dict[Key, NDArray[np.uint8]] = field(default_factory=dict)
    exponents: dict[str, int] = field(default_factory=dict, repr=False)

    def mask(self, task: str, sparsity: float, parameter: str) -> Tensor:
        """True where a weight stays, bool ``[*shape]``.

        Raises:
            KeyError: no such task, sparsity or ranked parameter.
        """
        key = (task, sparsity, parameter)
        if key not in self.cuts:
            tasks, levels, _ = (sorted({k[i] for k in self.cuts}) for i in range(3))
            raise KeyError(
                f"no mask for task {task!r}, sparsity {sparsity}, parameter {parameter!r}: there are tasks "
                f"{tasks}, sparsities {levels}, and the {len(self.parameters)} weight matrices with F"
            )
        shape = self.store.layout.parameter(parameter).shape
        if key in self.packed:
            bits = np.unpackbits(self.packed[key], count=int(np.prod(shape)))
            return torch.from_numpy(bits.view(bool).reshape(shape))
        threshold, seen = self.cuts[key]
        return torch.from_numpy(
            threshold.apply(_scores(self.store, task, parameter, self.exponent(task)), seen)[0]
        )

    def exponent(self, task: str) -> int:
        """F of a task is ranked in units of ``4 ** -exponent``."""
        if task not in self.exponents:
            self.exponents[task] = unit_exponent(self.store, [task])
        return self.exponents[task]

    def frame(self) -> pd.DataFrame:
        """Columns task, sparsity, stack, layer, parameter, units, kept."""
        info = {p.name: p for p in self.parameters}
        rows = [
            (task, sparsity, info[name].stack, info[name].layer, name, int(np.prod(info[name].shape)), kept)
            for (task, sparsity, name), kept in self.counts.items()
        ]
        columns = ["task", "sparsity", "stack", "layer", "parameter", "units", "kept"]
        return pd.DataFrame(rows, columns=columns)


def ranked_parameters(store: ContributionStore) -> tuple[ParameterInfo, ...]:
    """The instrumented parameters with two axes or more, in model order; biases and norms are not pruned."""
    chosen = set(store.parameters)
    return tuple(p for p in store.layout.parameters if p.name in chosen and len(p.shape) >= 2)


def unstructured_masks(
    store: ContributionStore,
    tasks: Iterable[str],
    sparsities: tuple[float, ...],
    scope: str,
    memory_budget: int,
) -> UnstructuredMasks:
    """Keep the weights with the highest F, exactly so many of the model or of each layer.

    Equal F are kept in order of parameter and position. Reads F three times and holds one parameter.
    """
    tasks = list(tasks)
    masks = UnstructuredMasks(store, ranked_parameters(store))
    total = sum(int(np.prod(p.shape)) for p in masks.parameters)
    fits = total * len(tasks) * len(sparsities) // 8 <= memory_budget // _SHARE
    for task in tasks:
        for members in _scopes(masks.parameters, scope):
            _cut(masks, task, members, sparsities, keep_bits=fits)
    return masks


def _scopes(parameters: tuple[ParameterInfo, ...], scope: str) -> list[list[ParameterInfo]]:
    groups: dict[tuple[str, int] | None, list[ParameterInfo]] = {}
    for info in parameters:
        groups.setdefault((info.stack, info.layer) if scope == "layer" else None, []).append(info)
    return list(groups.values())


def _cut(
    masks: UnstructuredMasks,
    task: str,
    members: list[ParameterInfo],
    sparsities: tuple[float, ...],
    *,
    keep_bits: bool,
) -> None:
    exponent = masks.exponent(task)

    def stretches() -> Iterator[NDArray[np.float32]]:
        return (_scores(masks.store, task, info.name, exponent) for info in members)

    total = sum(int(np.prod(info.shape)) for info in members)
    cuts = thresholds(stretches, [keep_count(total, s) for s in sparsities])
    seen = [0] * len(cuts)
    for info in members:
        scores = _scores(masks.store, task, info.name, exponent)
        for k, (sparsity, threshold) in enumerate(zip(sparsities, cuts, strict=True)):
            key = (task, sparsity, info.name)
            masks.cuts[key] = threshold, seen[k]
            mask, seen[k] = threshold.apply(scores, seen[k])
            masks.counts[key] = int(np.count_nonzero(mask))
            if keep_bits:
                masks.packed[key] = np.packbits(mask)


def _scores(store: ContributionStore, task: str, parameter: str, exponent: int) -> NDArray[np.float32]:
    """F in units in which float32 ranks it: a power of two changes no order."""
    fisher = store.fisher(task, parameter)
    return (fisher.double() * 4.0**exponent if exponent else fisher).float().numpy()
