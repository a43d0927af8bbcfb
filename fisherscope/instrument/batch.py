"""Samples padded into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fisherscope.instrument.data import Sample

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Padded samples of one task, on the model's device.

    Attributes:
        task: name of the task.
        rows: row numbers in the task.
        keys: identities of the samples.
        input_ids, attention_mask, position_ids: int64 ``[n, T]``; T is 0 for images.
        labels: int64 ``[n, L]``, -100 where there is no loss and at padding. L is T where labels stand
            beside positions, otherwise the number of labels of a sample or of target tokens.
        tokens: T_i, labels that bear loss (after the causal shift, where there is one), ``[n]`` int64.
        positions: attended positions of the longest sample.
        token_types: int64 ``[n, T]``, where samples are pairs of texts.
        pixels: float32 ``[n, channels, height, width]``, where samples are images.
    """

    task: str
    rows: tuple[int, ...]
    keys: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    tokens: Tensor
    positions: int
    token_types: Tensor | None = None
    pixels: Tensor | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Padded positions, and those of a decoder that has its own."""
        return self.positions, self.labels.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def sample_id(self, index: int) -> str:
        """Id of the sample at that place of the batch, such as "math_7"."""
        return f"{self.task}_{self.rows[index]}"


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
    ids = _padded([sample.input_ids for sample in chosen], pad_id, side)
    mask = _padded([(1,) * len(sample.input_ids) for sample in chosen], 0, side)
    beside = chosen[0].labelling in {"next", "position"}
    labels = _padded([sample.labels for sample in chosen], IGNORE, side if beside else "right")
    if chosen[0].labelling == "next":
        # the first real token is predicted by nothing; after left padding it would be by a pad
        labels[mask.cumsum(1) == 1] = IGNORE
    types = None
    if any(sample.token_types is not None for sample in chosen):
        types = _padded([s.token_types or (0,) * len(s.input_ids) for s in chosen], 0, side).to(device)
    images = [sample.pixels for sample in chosen if sample.pixels is not None]
    return Batch(
        task=task,
        rows=tuple(rows),
        keys=tuple(sample.key for sample in chosen),
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(device),
        labels=labels.to(device),
        tokens=torch.tensor([sample.tokens for sample in chosen], device=device, dtype=torch.int64),
        positions=max(sample.length for sample in chosen),
        token_types=types,
        pixels=torch.stack(images).to(device) if images else None,
    )


def _padded(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value, dtype=torch.long, device="cpu")
    for i, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        out[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long, device="cpu")
    return out
