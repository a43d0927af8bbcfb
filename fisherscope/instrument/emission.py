"""The gradients of one parameter for one batch, as extensions see them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.by_position import ByPosition, LinearMaps, NotByPosition
from fisherscope.instrument.squares import Sinks, Squares, measure
from fisherscope.layout import Member
from fisherscope.linalg import Dense, PerSampleGradient
from fisherscope.linalg.scaling import unscaled


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

    @property
    def is_zero(self) -> bool:
        """Whether the loss does not depend on the parameter at all."""
        return not self.gradient.bounds().any()

    @property
    def square_norms(self) -> list[Tensor]:
        """Sum of h ** 2 over each piece of each member, ``[n, pieces]`` float64; fills the sinks."""
        return self._squares.pieces

    @cached_property
    def _squares(self) -> Squares:
        source = Dense(self.dense) if self.want_dense else self.gradient
        return measure(source, self.factors, [member.partition for member in self.members], self.sinks)

    @cached_property
    def dots(self) -> list[Tensor]:
        """``<g, theta>`` over each piece of each member: ``[n, pieces]`` float64."""
        partitions = [member.partition for member in self.members]
        exponents = self._squares.exponents
        if exponents is None or not exponents.any():
            return [unscaled(values, 0) for values in self.gradient.dots(self.theta, partitions)]
        powers = torch.exp2(exponents.double())
        found = self.gradient.scaled(powers.to(self.factors)).dots(self.theta, partitions)
        return [(wide := unscaled(values, 0)) / powers.to(wide).unsqueeze(1) for values in found]
