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
        tokens=torch.tensor([sample.tokens for sample in chosen], device=device),
        positions=max(sample.length for sample in chosen),
        token_types=types,
        pixels=torch.stack(images).to(device) if images else None,
    )


def _padded(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        out[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return out
