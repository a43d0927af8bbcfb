"""Batches: a fixed plan over the full list of samples, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fisherscope.instrument.data import Sample

IGNORE = -100
_AUTO_POSITIONS = {"cpu": 4096}
_AUTO_POSITIONS_ACCELERATOR = 16384
_AUTO_ROWS = 128

BatchSize = int | Literal["auto"]


@dataclass(frozen=True)
class Batch:
    """Padded samples of one task, on the model's device.

    Attributes:
        task: name of the task.
        rows: row numbers in the task.
        input_ids, attention_mask, position_ids, labels: int64 ``[n, T]``; labels are -100 where there is
            no loss and at padding.
        tokens: T_i, labels that bear loss after the causal shift, ``[n]`` int64.
    """

    task: str
    rows: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def sample_id(self, index: int) -> str:
        """Id of the sample at that place of the batch, such as "math_7"."""
        return f"{self.task}_{self.rows[index]}"


def auto_positions(device: torch.device) -> int:
    """Padded positions per batch where the batch size is "auto"."""
    return _AUTO_POSITIONS.get(device.type, _AUTO_POSITIONS_ACCELERATOR)


def plan_batches(
    lengths: Sequence[int], batch_size: BatchSize, device: torch.device
) -> list[tuple[int, ...]]:
    """Cut the rows of a task into batches of similar length.

    The plan depends on the full list of lengths and the setting alone, so a resumed run makes the very
    batches of an uninterrupted one.

    Args:
        lengths: length of every sample, in row order.
        batch_size: samples per batch, or "auto": as many as fit a fixed budget of padded positions.
        device: where the model is; it sets the budget of "auto".

    Returns:
        Row numbers of each batch.
    """
    budget = auto_positions(device)
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches:
            grown = len(batches[-1]) + 1
            fits = (
                grown <= batch_size
                if batch_size != "auto"
                else (grown <= _AUTO_ROWS and grown * lengths[row] <= budget)
            )
            if fits:
                batches[-1].append(row)
                continue
        batches.append([row])
    return [tuple(batch) for batch in batches]


def make_batch(
    task: str,
    rows: Sequence[int],
    samples: Sequence[Sample],
    *,
    pad_id: int,
    side: Literal["left", "right"],
    device: torch.device,
) -> Batch:
    """Pad the given rows of a task into one batch.

    Args:
        task: name of the task.
        rows: rows to take.
        samples: all samples of the task.
        pad_id: any id of the vocabulary: padded positions are masked and bear no loss.
        side: where padding goes; positions count from the first real token either way.
        device: where the batch is put.
    """
    chosen = [samples[row] for row in rows]
    width = max(sample.length for sample in chosen)
    shape = (len(chosen), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, sample in enumerate(chosen):
        span = slice(0, sample.length) if side == "right" else slice(width - sample.length, width)
        ids[i, span] = torch.tensor(sample.input_ids)
        labels[i, span] = torch.tensor(sample.labels)
        # the first real token is predicted by nothing; after left padding it would be by a pad
        labels[i, span.start] = IGNORE
        mask[i, span] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    tokens = torch.tensor([sample.tokens for sample in chosen])
    return Batch(task, tuple(rows), *(t.to(device) for t in (ids, mask, positions, labels, tokens)))
