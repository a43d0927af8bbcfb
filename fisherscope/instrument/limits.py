"""How large a batch may be: what fits the memory that there is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fisherscope.errors import CorruptStoreError, FisherscopeError
from fisherscope.store import StoreHeader
from fisherscope.words import counted

_POSITIONS = {"cpu": 4096}
_POSITIONS_ACCELERATOR = 16384
_ROWS = 128
# gradients of activations, and copies that live for an instant, come beside what the graph keeps
_BEYOND_SAVED = 2.0


@dataclass(frozen=True)
class BatchLimits:
    """The largest batch.

    Attributes:
        rows: samples.
        positions: padded positions; None for any number.
    """

    rows: int
    positions: int | None = None

    def allow(self, rows: int, length: int) -> bool:
        """Whether ``rows`` samples, padded to ``length``, make a batch; a single sample always does."""
        return rows <= max(self.rows, 1) and (
            rows == 1 or self.positions is None or rows * length <= self.positions
        )

    def __str__(self) -> str:
        if self.positions is None:
            return f"batches of {counted(self.rows, 'sample')}"
        return f"batches of up to {self.positions} padded positions and {counted(self.rows, 'sample')}"


def most_efficient(device: torch.device) -> BatchLimits:
    """Beyond this, larger batches are not faster."""
    return BatchLimits(_ROWS, _POSITIONS.get(device.type, _POSITIONS_ACCELERATOR))


@dataclass(frozen=True)
class Footprint:
    """Memory that batches take.

    Attributes:
        per_position: bytes for each padded position.
        per_row: bytes for each sample, whatever its length: its gradients of one parameter.
        fixed: bytes of accumulators.
    """

    per_position: float
    per_row: float
    fixed: int

    @classmethod
    def of(cls, saved: int, length: int, largest_stored: int, accumulators: int) -> Footprint:
        """From what the graph of one sample keeps.

        Args:
            saved: bytes that autograd saves for a sample of this length.
            length: its positions; the longest sample tells most, as eager attention grows with the square.
            largest_stored: entries of the largest parameter whose gradients are stored.
            accumulators: their bytes.
        """
        return cls(_BEYOND_SAVED * saved / length, 4.0 * largest_stored, accumulators)

    def of_batch(self, rows: int, length: int) -> int:
        """Bytes of a batch, accumulators included."""
        return int(rows * length * self.per_position + rows * self.per_row) + self.fixed

    def limits(self, budget: int, length: int, device: torch.device) -> BatchLimits:
        """The largest batches that stay within a budget.

        Args:
            budget: bytes.
            length: positions of the longest sample.
            device: where the model is.

        Raises:
            FisherscopeError: the accumulators alone exceed the budget.
        """
        room = budget - self.fixed
        if room <= 0:
            raise FisherscopeError(
                f"the accumulators of the Fisher take {self.fixed:,} bytes, and {budget:,} may be taken: use "
                'Fisher(shape="groups"), fewer parameters, or a larger memory_budget'
            )
        if self.of_batch(1, length) > budget:
            warnings.warn(
                f"one sample of {length} positions will take about {self.of_batch(1, length):,} bytes, more "
                f"than the {budget:,} that may be taken: max_length, gradient checkpointing or fewer stored "
                "gradients lower that",
                stacklevel=2,
            )
        efficient = most_efficient(device)
        assert efficient.positions is not None
        # half for what grows with positions, half for what grows with samples
        positions = int(min(efficient.positions, room / 2 / max(self.per_position, 1.0)))
        rows = int(min(efficient.rows, room / 2 / max(self.per_row, 1.0)))
        return BatchLimits(max(1, rows), max(length, positions))


def limits_of_store(header: StoreHeader) -> BatchLimits:
    """Those that a store was begun with: a resumed run makes the same batches.

    Raises:
        CorruptStoreError: the header does not say.
    """
    rows, positions = (header.options.get(f"batch_{part}") for part in ("rows", "positions"))
    if type(rows) is not int or not (positions is None or type(positions) is int):
        raise CorruptStoreError("store.json does not say how large batches are: restore it from a copy")
    return BatchLimits(rows, positions)


def plan_batches(
    lengths: Sequence[int], limits: BatchLimits, rows: Iterable[int] | None = None
) -> list[tuple[int, ...]]:
    """Cut the rows of a task into batches of similar length, the longest first.

    Memory that does not suffice is then found at once. The plan depends on the full list of lengths and the
    limits alone, so a resumed run makes the very batches of an uninterrupted one.

    Args:
        lengths: length of every sample, in row order.
        limits: of a batch.
        rows: which rows; all by default.

    Returns:
        Row numbers of each batch.
    """
    chosen = range(len(lengths)) if rows is None else rows
    order = sorted(chosen, key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and limits.allow(len(batches[-1]) + 1, lengths[batches[-1][0]]):
            batches[-1].append(row)
        else:
            batches.append([row])
    return [tuple(batch) for batch in batches]
