"""How gradients are scaled before cosines are taken: by which F, and by whose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.groupvalues import group_chunks
from fisherscope.analyses.slices import Block, SliceReader, Whole, damping, stored_blocks


def whiten(gradients: Tensor, fisher: Tensor, lam: float) -> Tensor:
    """Natural gradients under the diagonal Fisher: ``u = h / sqrt(F + lam)``.

    Args:
        gradients: h ``[n, k]``.
        fisher: F ``[k]``, or ``[n, k]`` where each sample has its own.
        lam: damping, > 0.

    Returns:
        ``[n, k]`` float32.
    """
    return gradients / (fisher + lam).sqrt()


def attention_norms(reader: SliceReader, task: str) -> Tensor:
    """Norm of each sample's g over the attention weights whose gradients are stored, ``[n]`` float32.

    In the units of the reader.
    """
    groups = reader.store.group_table.frame()
    stored = {block.partition.parameter for block in stored_blocks(reader.store)}
    chosen = (groups["kind"] == "head") & groups["parameter"].isin(stored)
    squares = [
        chunk.square[:, chosen.to_numpy()].sum(1)
        for chunk in group_chunks(reader.store, task, reader.memory_budget)
    ]
    return torch.from_numpy(np.sqrt(np.concatenate(squares)) * 2.0**reader.exponent).float()


@dataclass(frozen=True)
class BlockScales:
    """What whitens one block of a pair of tasks.

    Attributes:
        fishers: F of each task ``[heads, size]``.
        counts: samples that each of them is the mean of.
        whitening: of whom F is, and of what.
        lam: damping, per task.
        weights: per task, what turns h_i into the vector whose square F averages, ``[n]``; None for h itself.
    """

    fishers: dict[str, Tensor]
    counts: dict[str, int]
    whitening: Whitening
    lam: dict[str, float]
    weights: dict[str, Tensor] | None

    def is_flat(self, head: int) -> bool:
        """Whether F is 0 throughout a slice, in all tasks."""
        return not any(bool((fisher[head] > 0).any()) for fisher in self.fishers.values())

    def natural(self, task: str, head: int, rows: slice, normalised: Tensor) -> Tensor:
        """The vectors whose cosines count.

        Args:
            task: whose samples.
            head: of which slice.
            rows: which samples.
            normalised: their h ``[rows, size]``.
        """
        config = self.whitening.config
        if config.metric == "euclidean":
            return normalised
        if config.fisher_pool == "per_task":
            return whiten(normalised, self.fishers[task][head], self.lam[task])
        own = self.fishers[task][head]
        if config.fisher_pool == "leave_one_out":
            own = self._without_each(task, head, rows, normalised)
        others = [fisher[head] for name, fisher in self.fishers.items() if name != task]
        pooled = torch.stack([own, *(fisher.expand_as(own) for fisher in others)]).mean(0)
        return whiten(normalised, pooled, self.lam[task])

    def _without_each(self, task: str, head: int, rows: slice, normalised: Tensor) -> Tensor:
        """F of the task without each of its samples, ``[rows, size]``: 0 where it has no other."""
        n = self.counts[task]
        weighted = normalised if self.weights is None else normalised * self.weights[task][rows, None]
        # where no other sample contributes n F - c is 0 up to rounding
        without = (n * self.fishers[task][head] - weighted.square()).clamp_(min=0)
        return without / (n - 1) if n > 1 else torch.zeros_like(without)


class Whitening:
    """Makes the scales of each block, for some tasks that are compared with each other.

    Attributes:
        config: metric, fisher_pool, fisher_weighting and damping.
    """

    def __init__(self, reader: SliceReader, tasks: tuple[str, ...], config: ConflictConfig) -> None:
        self._reader, self._tasks, self.config = reader, tasks, config
        self._weights: dict[str, Tensor] | None = None
        if config.fisher_weighting == "unit" and config.metric == "natural":
            self._weights = {task: self._unit(task) for task in tasks}

    def block(self, block: Block | Whole) -> BlockScales:
        """The scales of one block."""
        fishers = {task: self._fisher(task, block) for task in self._tasks}
        exponent = self._reader.exponent
        if self.config.fisher_pool == "per_task":
            lam = {task: damping(fisher, self.config, exponent) for task, fisher in fishers.items()}
        else:
            pooled = damping(torch.stack([*fishers.values()]).mean(0), self.config, exponent)
            lam = dict.fromkeys(self._tasks, pooled)
        full = self._reader.source == "full" and self._weights is None
        count = self._reader.rows if full else self._reader.stored
        return BlockScales(fishers, {task: count(task) for task in self._tasks}, self, lam, self._weights)

    def _unit(self, task: str) -> Tensor:
        """1 / |h_i|; 0 where there is no gradient."""
        norms = attention_norms(self._reader, task) * self._reader.factors(task)
        return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))

    def _fisher(self, task: str, block: Block | Whole) -> Tensor:
        if self._weights is None:
            return self._reader.fisher(task, block)
        return self._reader.mean_square(task, block, self._weights[task])
