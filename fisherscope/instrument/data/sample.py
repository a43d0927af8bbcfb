"""The sample: what the model will see of one row, and the labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

IGNORED = -100
"""The label of a position that bears no loss."""

Labelling = Literal["next", "position", "whole", "decoder"]
"""What labels stand beside: the position before (causal), their own position, the sample, or nothing."""


@dataclass(frozen=True)
class Sample:
    """One row of a task, without padding.

    Attributes:
        input_ids: token ids of the attended positions; none for an image.
        labels: not shifted; -100 where there is no loss. One per position where the labelling is "next" or
            "position"; those of the whole sample ("whole"); a sequence of its own ("decoder").
        text: what the row said before truncation; None where it came as ids and no tokenizer was given.
        truncated: tokens that were cut off at the right.
        occurrence: how many samples of the same task with the same content stand before this one.
        labelling: what the labels stand beside.
        token_types: which of two texts each position belongs to, where that was given.
        pixels: an image ``[channels, height, width]`` float32, where the sample is one.
        patches: attended positions of an image.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str | None = None
    truncated: int = 0
    occurrence: int = 0
    labelling: Labelling = "next"
    token_types: tuple[int, ...] | None = None
    pixels: Tensor | None = field(default=None, compare=False)
    patches: int = 0

    @cached_property
    def key(self) -> str:
        """32 hex digits of a sha256 over what the model sees, labels and occurrence: its identity in a store.

        Text and truncation are no part of it: they do not change the gradient.
        """
        header = np.array([len(self.input_ids), self.occurrence], dtype="<i8")
        body = np.array([*self.input_ids, *self.labels], dtype="<i8")
        sha = hashlib.sha256(header.tobytes() + body.tobytes())
        if self.token_types is not None:
            sha.update(b"types" + np.array(self.token_types, dtype="<i8").tobytes())
        if self.pixels is not None:
            sha.update(f"pixels{tuple(self.pixels.shape)}".encode())
            sha.update(self.pixels.contiguous().numpy().astype("<f4", copy=False).tobytes())
        return sha.hexdigest()[:32]

    @property
    def length(self) -> int:
        """Attended positions."""
        return len(self.input_ids) or self.patches

    @property
    def cost(self) -> int:
        """Positions that take memory in a pass: those of a decoder, too."""
        return self.length + (len(self.labels) if self.labelling == "decoder" else 0)

    @cached_property
    def tokens(self) -> int:
        """T, the labels that bear loss: other than -100, where the causal shift drops position 0."""
        counted = self.labels[1:] if self.labelling == "next" else self.labels
        return sum(label != IGNORED for label in counted)
