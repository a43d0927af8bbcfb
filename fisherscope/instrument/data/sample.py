"""The sample: token ids and labels of one row, as the model will see them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORED = -100
"""The label of a position that bears no loss."""


@dataclass(frozen=True)
class Sample:
    """One row of a task, tokenised, without padding.

    Attributes:
        input_ids: token ids of the attended positions.
        labels: one label per position, not shifted; -100 where there is no loss.
        text: what the row said before truncation; None where it came as ids and no tokenizer was given.
        truncated: tokens that were cut off at the right.
        occurrence: how many samples of the same task with the same ids and labels stand before this one.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str | None = None
    truncated: int = 0
    occurrence: int = 0

    @cached_property
    def key(self) -> str:
        """32 hex digits of a sha256 over ids, labels and occurrence: the sample's identity in a store.

        Text and truncation are no part of it: they do not change the gradient.
        """
        header = np.array([len(self.input_ids), self.occurrence], dtype="<i8")
        body = np.array([*self.input_ids, *self.labels], dtype="<i8")
        return hashlib.sha256(header.tobytes() + body.tobytes()).hexdigest()[:32]

    @property
    def length(self) -> int:
        """Attended positions."""
        return len(self.input_ids)

    @cached_property
    def tokens(self) -> int:
        """Loss-bearing tokens T: labels other than -100, after the causal shift drops position 0."""
        return sum(label != IGNORED for label in self.labels[1:])
