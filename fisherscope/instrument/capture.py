"""Gradients that are kept as they come, in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector
from fisherscope.store import SegmentWriter


class Capture(Collector):
    """Keeps the gradients of some parameters, batch after batch.

    Attributes:
        gradients: per parameter the rows so far, each ``[n, *shape]`` float32 on the CPU.
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        """Keep those of these parameters."""
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}

    @override
    def wants_dense(self, parameter: str) -> bool:
        return parameter in self.gradients

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        if emission.parameter in self.gradients:
            self.gradients[emission.parameter].append(emission.dense.detach().float().cpu())

    def stacked(self) -> dict[str, Tensor]:
        """Per parameter ``[samples, *shape]``, in the order of the batches."""
        return {name: torch.cat(rows) for name, rows in self.gradients.items()}
