"""The gradients of one parameter for one batch, as extensions see them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.by_position import ByPosition, LinearMaps, NotByPosition
from fisherscope.layout import Member
from fisherscope.linalg import Dense, PerSampleGradient


@dataclass
class Sinks:
    """Accumulators that want a pass over the normalised gradients, ``[*shape]`` float32 each.

    Attributes:
        square: ``sum_i h_i ** 2`` is added here.
        total: ``sum_i h_i`` is added here.
    """

    square: Tensor | None = None
    total: Tensor | None = None


@dataclass
class Emission:
    """Per-sample gradients of one parameter for one batch, with what is shared between extensions.

    Attributes:
        parameter: its name.
        batch: the samples.
        gradient: g, as the rule made it.
        theta: the parameter's values, in the compute dtype.
        members: the groups that the parameter adds to.
        factors: h_i = factors_i g_i, ``[n]``.
        sinks: accumulators to fill in the one pass over the gradients.
        want_dense: whether somebody needs the gradients themselves; they are then formed once.
        linear_maps: tells whether the parameter is the weight of a linear map.
    """

    parameter: str
    batch: Batch
    gradient: PerSampleGradient
    theta: Tensor
    members: tuple[Member, ...]
    factors: Tensor
    sinks: Sinks
    want_dense: bool
    linear_maps: LinearMaps

    @cached_property
    def by_position(self) -> ByPosition | NotByPosition:
        """What the linear map was given and what came back, or why there is no such thing."""
        return self.linear_maps.split(self.parameter, self.gradient, self.batch)

    @cached_property
    def dense(self) -> Tensor:
        """G itself, ``[n, *shape]`` float32."""
        return self.gradient.dense()

    @cached_property
    def square_norms(self) -> list[Tensor]:
        """Sum of h ** 2 over each piece of each member: ``[n, pieces]``. Fills the sinks on first use."""
        source = Dense(self.dense) if self.want_dense else self.gradient
        normalised = source.scaled(self.factors)
        partitions = [member.partition for member in self.members]
        if self.sinks.square is None and self.sinks.total is None:
            return normalised.norms(partitions)
        return normalised.accumulate(square=self.sinks.square, total=self.sinks.total, partitions=partitions)

    @cached_property
    def dots(self) -> list[Tensor]:
        """``<g, theta>`` over each piece of each member: ``[n, pieces]``."""
        return self.gradient.dots(self.theta, [member.partition for member in self.members])
