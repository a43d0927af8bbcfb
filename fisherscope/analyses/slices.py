"""Head slices of a store, one in memory at a time, and how they are whitened."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fisherscope.analyses.magnitude import unit_exponent
from fisherscope.errors import NotStoredError
from fisherscope.layout import AttentionLayout, ParameterInfo, Partition
from fisherscope.layout.attention import Part
from fisherscope.linalg.normalization import factors
from fisherscope.store import ContributionStore
from fisherscope.store.presence import require

# How many tensors of the size of what is read exist at the same time, at most, while working on it.
_COPIES = 6
_TOO_SMALL = 1e-30  # the least damping is 1.2e-38, which must be small beside F


class Damping(Protocol):
    """The three options that damp a division by F."""

    @property
    def epsilon(self) -> float:
        """Smallest denominator."""

    @property
    def ridge(self) -> float:
        """Absolute damping."""

    @property
    def ridge_rel(self) -> float:
        """Damping relative to the median F of a block."""


@dataclass(frozen=True)
class Block:
    """One of Q, K, V, O of one layer whose sample gradients are stored."""

    attention: AttentionLayout
    name: str
    part: Part
    partition: Partition

    @property
    def key(self) -> dict[str, str | int]:
        """Columns stack, layer, block."""
        return {"stack": self.attention.stack, "layer": self.attention.layer, "block": self.name}

    def __len__(self) -> int:
        return len(self.partition)

    def read(self, store: ContributionStore, task: str, head: int, rows: slice) -> Tensor:
        """Signed g of one head ``[rows, size]``, float32."""
        return store.slice(
            task,
            layer=self.attention.layer,
            block=self.name,
            head=head,
            part=self.part,
            stack=self.attention.stack,
            samples=rows,
        )


@dataclass(frozen=True)
class Whole:
    """A whole parameter, in the place of a block with a single slice."""

    info: ParameterInfo

    @property
    def partition(self) -> Partition:
        """All of it as one piece."""
        shape = self.info.shape
        return Partition.regular(self.info.name, shape, 0, 1, shape[0])

    def __len__(self) -> int:
        return 1

    def read(self, store: ContributionStore, task: str, head: int, rows: slice) -> Tensor:
        """Signed g ``[rows, size]``, float32."""
        del head
        return store.gradients(task, self.info.name, rows).flatten(1)


def stored_blocks(store: ContributionStore, part: Part = "weight") -> list[Block]:
    """The blocks whose sample gradients the store holds, in model order."""
    stored = set(store.gradient_parameters)
    blocks = []
    for attention, block in store.layout.head_blocks():
        partition = block.part(part)
        if partition is not None and partition.parameter in stored:
            blocks.append(Block(attention, block.name, part, partition))
    return blocks


def find_block(store: ContributionStore, layer: int, block: str, part: Part, stack: str | None) -> Block:
    """The block of that name; where ``stack`` is None, of the only stack, or of the decoder of several.

    Raises:
        KeyError: no such layer or block, or its gradients are not stored.
    """
    stack = store.layout.stack_or_only(stack)
    for found in stored_blocks(store, part):
        if (found.attention.layer, found.name, found.attention.stack) == (layer, block, stack):
            return found
    known = sorted({(b.attention.layer, b.name) for b in stored_blocks(store, part)})
    raise KeyError(f"no gradients of {block} of layer {layer} ({part}, {stack}) in the store: it has {known}")


def gqa_map(store: ContributionStore) -> list[dict[str, object]]:
    """Per attention layer: its heads, and the kv head that each query head uses."""
    return [
        {
            "stack": a.stack,
            "layer": a.layer,
            "n_heads": a.n_heads,
            "n_kv_heads": a.n_kv_heads,
            "kv_head": [a.kv_head(head) for head in range(a.n_heads)],
        }
        for a in store.layout.attention
    ]


class SliceReader:
    """Reads gradients and F of head slices within a budget of memory.

    Attributes:
        source: where F comes from: "full" (the full-shape aggregate of the collection) or "gradients"
            (the mean over the stored gradients).
    """

    def __init__(
        self, store: ContributionStore, memory_budget: int, tasks: Sequence[str] | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            store: an open store.
            memory_budget: bytes.
            tasks: that are compared, which settle the units; by default all of the store.
        """
        self.store = store
        self._tasks = tasks
        self.memory_budget = memory_budget
        full = store.header.fisher_shape == "full" and {*store.gradient_parameters} <= {*store.parameters}
        self.source = "full" if full else "gradients"
        self._factors: dict[str, Tensor] = {}
        self._stored: dict[str, int] = {}
        self._held: tuple[Block | None, dict[str, Tensor]] = None, {}
        self._apart: set[str] = set()

    @cached_property
    def exponent(self) -> int:
        """All gradients come multiplied by ``2 ** exponent``, and F by its square; 0 for usual sizes."""
        return unit_exponent(self.store, self._tasks)

    def _in_units(self, gradients: Tensor) -> Tensor:
        return gradients * 2.0**self.exponent if self.exponent else gradients

    def lam_of(self, lam: float) -> float:
        """Damping as it is, of that in the units of the reader."""
        return lam * 4.0**-self.exponent

    def factors(self, task: str) -> Tensor:
        """What makes h_i of g_i, per sample ``[n]``."""
        if task not in self._factors:
            tokens = self.store.samples(task)["tokens"].to_numpy()
            values = factors(tokens, self.store.header.normalization)
            self._factors[task] = torch.from_numpy(values).float()
        return self._factors[task]

    def rows(self, task: str, limit: int | None = None) -> int:
        """Samples of a task, at most ``limit``."""
        n = len(self.factors(task))
        return n if limit is None else min(n, limit)

    def stored(self, task: str) -> int:
        """How many samples of a task have their gradients stored, counted from the first."""
        if task not in self._stored:
            place = self.store.gradient_plan.places[self.store.gradient_parameters[0]]
            index, first = self.store.task_index(task), self.rows(task)
            for chunk in index.chunks(np.arange(first)):
                try:
                    require(self.store, chunk, place)
                except NotStoredError:
                    first = min(first, int(chunk.targets.min()))
            self._stored[task] = first
        return self._stored[task]

    def usable(self, task: str, limit: int | None) -> int:
        """Samples of a task whose gradients are stored, counted from the first, at most ``limit``."""
        return min(self.stored(task), self.rows(task, limit))

    def chunks(self, block: Block | Whole, rows: int) -> list[slice]:
        """Stretches of samples that fit the budget, for one slice of this block."""
        step = max(1, self.memory_budget // (4 * _COPIES * block.partition.slice_size))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def hold(self, block: Block, rows: dict[str, int]) -> None:
        """Read all heads of a block at once, where they fit the budget and are not stored head by head.

        All heads share one side of a factored gradient, which would be read again for each.

        Args:
            block: the block that is worked on next; what was held of another is dropped.
            rows: samples per task.
        """
        self._held = None, {}
        entries = sum(rows.values()) * block.partition.slice_size
        fits = 4 * entries * (len(block) + _COPIES) <= self.memory_budget
        if not fits or self.store.encoding(block.partition.parameter) == "dense":
            return
        values = {}
        for task, n in rows.items():
            found = self.store.slices(
                task,
                layer=block.attention.layer,
                block=block.name,
                part=block.part,
                stack=block.attention.stack,
                samples=slice(0, n),
            )
            values[task] = self._in_units(found)
        self._held = block, values

    def gradients(self, task: str, block: Block | Whole, head: int, rows: slice) -> Tensor:
        """Signed g of one slice, in units ``[rows, size]``, float32; not to be changed in place."""
        held, values = self._held
        if held is block and task in values and rows.stop <= values[task].shape[1]:
            return values[task][head, rows]
        return self._in_units(block.read(self.store, task, head, rows))

    def normalised(self, task: str, block: Block | Whole, head: int, rows: slice) -> Tensor:
        """Normalised h of one slice ``[rows, size]``, float32."""
        return self.gradients(task, block, head, rows) * self.factors(task)[rows, None]

    def fisher(self, task: str, block: Block | Whole) -> Tensor:
        """F of all slices of a block, in units ``[heads, size]``; float64 where float32 cannot hold it.

        Over all samples of the task; where F comes from gradients, over those whose gradients are stored.
        """
        if self.source == "full":
            full = self.store.fisher(task, block.partition.parameter)
            if self.exponent:
                full = (full.double() * 4.0**self.exponent).float()
            self._warn_of_apart(task, block, float(full.max()))
            return block.partition.gather(full[None])[:, 0]
        return self.mean_square(task, block)

    def _warn_of_apart(self, task: str, block: Block | Whole, largest: float) -> None:
        if not 0 < largest < _TOO_SMALL or task in self._apart:
            return
        self._apart.add(task)
        warnings.warn(
            f"F of {block.partition.parameter} in task {task!r} is at most {self.lam_of(largest):.1g}, so "
            "far below that of the other tasks that no damping in float32 suits both: scores that divide by "
            "it alone mean nothing. Analyse the task by itself (tasks=[...]), or collect it again with its "
            "losses multiplied by a power of two",
            stacklevel=3,
        )

    def mean_square(self, task: str, block: Block | Whole, weights: Tensor | None = None) -> Tensor:
        """Mean of h^2, or of (weight * h)^2, over the stored gradients: ``[heads, size]``, float32."""
        rows = self.stored(task)
        values = torch.zeros(len(block), block.partition.slice_size, dtype=torch.float64, device="cpu")
        for head in range(len(block)):
            for chunk in self.chunks(block, rows):
                gradients = self.normalised(task, block, head, chunk)
                if weights is not None:
                    gradients.mul_(weights[chunk, None])
                values[head] += gradients.square_().sum(0)
        return (values / max(rows, 1)).float()


class Loaded:
    """g of one slice per task: read once where all samples fit the budget, else again at each call.

    Attributes:
        fits: whether one stretch per task holds all its samples, and it is read only once.
    """

    def __init__(self, reader: SliceReader, block: Block | Whole, head: int, rows: dict[str, int]) -> None:
        self.reader, self.block, self.head = reader, block, head
        self.chunks = {task: reader.chunks(block, n) for task, n in rows.items()}
        self.fits = len(reader.chunks(block, sum(rows.values()))) == 1
        self._kept: dict[str, Tensor] = {}

    def __call__(self, task: str) -> Iterator[tuple[slice, Tensor]]:
        """Stretches of samples with their signed g ``[rows, size]``; not to be changed in place."""
        for rows in self.chunks[task]:
            if task in self._kept:
                yield rows, self._kept[task]
                continue
            values = self.reader.gradients(task, self.block, self.head, rows)
            if self.fits:
                self._kept[task] = values
            yield rows, values


def damping(fisher: Tensor, config: Damping, exponent: int = 0) -> float:
    """Damping lam of one block: ``max(epsilon, ridge, ridge_rel * median of F over the block)``.

    Args:
        fisher: F of the block, any shape.
        config: holds epsilon, ridge, ridge_rel.
        exponent: F is in units of ``4 ** -exponent``, and so is what is returned; ``ridge`` is not, and
            ``epsilon`` is a number that no denominator falls below.
    """
    ridge = config.ridge * 4.0**exponent
    return max(config.epsilon, ridge, config.ridge_rel * float(np.median(fisher.numpy())))
