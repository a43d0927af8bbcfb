"""What an extension is: frozen options, and a collector that works for one task."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fisherscope.instrument.emission import Emission
from fisherscope.instrument.squares import Sinks
from fisherscope.layout import GroupTable, ModelLayout
from fisherscope.linalg.normalization import Normalization
from fisherscope.store import SegmentWriter
from fisherscope.store.encodings import Encodings


@dataclass(frozen=True)
class Context:
    """What collectors may know of the run.

    Attributes:
        layout: the model's layout.
        parameters: names and values of the instrumented parameters.
        groups: the table of groups.
        normalization: how g becomes h.
        device: where accumulators live.
    """

    layout: ModelLayout
    parameters: Mapping[str, nn.Parameter]
    groups: GroupTable
    normalization: Normalization
    device: torch.device
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def warn_once(self, message: str) -> None:
        """Warn, unless another task of the same run has said the very same."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)


class Collector(ABC):
    """Consumes the emissions of one task's batches.

    The loop calls :meth:`begin`, then :meth:`update` once per parameter in the order of the backward pass,
    then :meth:`end`. What must survive a crash without being written per sample is the state.

    Attributes:
        labels: whose gradients it wants; other labels than the data's take backward passes of their own, with
            one :meth:`update` per parameter and pass, whose squares are to be added up.
        draws: how many times sampled labels are drawn.
    """

    labels: str = "data"
    draws: int = 1

    def wants_dense(self, parameter: str) -> bool:
        """Whether :meth:`update` reads ``emission.dense`` of this parameter."""
        del parameter
        return False

    def sinks(self, parameter: str) -> Sinks:
        """Accumulators to be filled for this parameter."""
        del parameter
        return Sinks()

    def stored_as(self, encodings: Encodings) -> None:
        """Learn how the store keeps gradients, before the first batch."""

    def begin(self, n: int) -> None:
        """A batch of ``n`` samples begins."""

    @abstractmethod
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        """Take one parameter's gradients.

        Args:
            emission: the gradients.
            segment: where per-sample rows go; None when the batch is redone for its aggregates alone.
            start: the batch's first row in the segment.
        """

    def end(self, segment: SegmentWriter | None, start: int) -> None:
        """The batch has ended: write rows, merge moments."""

    def state(self) -> dict[str, Tensor]:
        """Aggregates, as CPU tensors; they may be the live accumulators, so write them before going on."""
        return {}

    def load_state(self, arrays: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` gave; unknown names are for other collectors."""


@dataclass(frozen=True)
class Extension(ABC):
    """Options of one quantity. Subclasses are frozen dataclasses that validate in ``__post_init__``."""

    name: ClassVar[str]

    @abstractmethod
    def collector(self, context: Context) -> Collector:
        """A fresh collector for one task."""

    def collectors(self, context: Context) -> Sequence[Collector]:
        """Fresh collectors for one task: several where one quantity is had in several ways."""
        return (self.collector(context),)

    def settled(self, layout: ModelLayout, instrumented: tuple[str, ...]) -> Self:
        """The same with what an option leaves open chosen for this model.

        A store is known by what was chosen, so that whoever names the same goes on with it.

        Args:
            layout: of the model.
            instrumented: names of the instrumented parameters, in model order.
        """
        del layout, instrumented
        return self

    def options(self) -> dict[str, Any]:
        """The options as JSON data; part of the run's fingerprint."""
        return asdict(self)
