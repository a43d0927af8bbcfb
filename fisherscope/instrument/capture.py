"""Gradients and their factors that are kept as they come, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.errors import CoverageError
from fisherscope.instrument.by_position import ByPosition
from fisherscope.instrument.data import Sample
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector
from fisherscope.instrument.extensions.factors import kept_terms
from fisherscope.store import SegmentWriter

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Of one sample: what a linear map was given ``[T, in]``, and the gradient of what it gave ``[T, out]``."""

Factors: TypeAlias = dict[str, Pair]
"""Of one sample, by weight."""


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


class CaptureFactors(Collector):
    """Keeps the factors of the gradients of some weights, position by position, without padding.

    Attributes:
        factors: per parameter those of each sample so far, by its place among the samples; float32, CPU.
    """

    def __init__(self, sides: Mapping[str, str | None], samples: Sequence[Sample]) -> None:
        """Keep those of these parameters.

        Args:
            sides: per parameter whose positions its layer sees, "input" or "target".
            samples: those of the batches, by row number.
        """
        self.factors: dict[str, dict[int, Pair]] = {name: {} for name in sides}
        self._sides = sides
        self._samples = samples

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        if emission.parameter in self.factors:
            pairs = zip(emission.batch.rows, self._pairs(emission), strict=True)
            self.factors[emission.parameter].update(pairs)

    def _pairs(self, emission: Emission) -> list[Pair]:
        name, found = emission.parameter, emission.by_position
        is_target = self._sides[name] == "target"
        samples = [self._samples[row] for row in emission.batch.rows]
        lengths = [len(s.labels) if is_target else s.length for s in samples]
        if isinstance(found, ByPosition):
            kept = kept_terms(found, lengths, is_target=is_target)
            if isinstance(kept, str):
                raise _refusal(name, kept)
            a, d = (side[kept].detach().float().cpu() for side in (found.inputs, found.output_gradients))
        elif found.is_linear_map and emission.is_zero:
            # the loss does not depend on it: whatever it was given, times nothing
            outputs = emission.linear_maps.output_axes[name]
            shape = emission.gradient.shape
            a, d = (
                torch.zeros(sum(lengths), shape[1 - outputs], dtype=torch.float32, device="cpu"),
                torch.zeros(sum(lengths), shape[outputs], dtype=torch.float32, device="cpu"),
            )
        else:
            raise _refusal(name, found.reason)
        # copies: a view would keep the whole batch alive
        pieces = (torch.split(side, lengths) for side in (a, d))
        return [(x.clone(), y.clone()) for x, y in zip(*pieces, strict=True)]


def _refusal(parameter: str, reason: str) -> CoverageError:
    return CoverageError(
        f"the gradient of {parameter} is no sum over the positions of a sample: {reason}. Leave it out of "
        "parameters=, or take scope.gradients(store, ids)"
    )
