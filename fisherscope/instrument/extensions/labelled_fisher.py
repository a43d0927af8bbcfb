"""The diagonal Fisher under other labels than the data's, from backward passes of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context
from fisherscope.instrument.extensions.full_sums import FullSums
from fisherscope.instrument.extensions.group_values import group_zeros
from fisherscope.instrument.squares import Sinks
from fisherscope.linalg import Moments
from fisherscope.store import SegmentWriter


class LabelledFisherCollector(Collector):
    """Sums of h ** 2 in the parameters' shape, and moments of each group over the samples."""

    def __init__(self, context: Context, labels: str, *, draws: int = 1, full: bool = True) -> None:
        """Zero accumulators.

        Args:
            context: of the run.
            labels: a label source other than "data".
            draws: of sampled labels.
            full: also in the shape of each parameter.
        """
        self.labels = labels
        self.draws = draws
        self._device = context.device
        self._moments = Moments.empty(len(context.groups))
        self._values = torch.empty(0, dtype=torch.float64, device="cpu")
        self._sums = FullSums(context.parameters if full else {}, labels, mean=False)

    @override
    def sinks(self, parameter: str) -> Sinks:
        return self._sums.sinks(parameter)

    @override
    def begin(self, n: int) -> None:
        self._values = group_zeros(n, len(self._moments.mean), self._device)

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        self._sums.added(emission)
        for member, norms in zip(emission.members, emission.square_norms, strict=True):
            self._values[:, member.first : member.first + norms.shape[1]] += norms.to(self._values.device)

    @override
    def end(self, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        self._sums.check()
        self._moments = self._moments.merge(Moments.of(self._values.cpu().numpy()))

    @override
    def state(self) -> dict[str, Tensor]:
        prefix = f"moments/{self.labels}"
        return {
            **self._sums.state(),
            f"{prefix}/count": torch.tensor([self._moments.count], dtype=torch.int64, device="cpu"),
            f"{prefix}/mean": torch.from_numpy(self._moments.mean.copy()),
            f"{prefix}/m2": torch.from_numpy(self._moments.m2.copy()),
        }

    @override
    def load_state(self, arrays: Mapping[str, Tensor]) -> None:
        self._sums.load_state(arrays)
        prefix = f"moments/{self.labels}"
        self._moments = Moments(
            int(arrays[f"{prefix}/count"]),
            arrays[f"{prefix}/mean"].numpy().copy(),
            arrays[f"{prefix}/m2"].numpy().copy(),
        )
