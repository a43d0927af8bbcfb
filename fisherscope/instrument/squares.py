"""Squares of normalised gradients, whatever their magnitude, and the sums that want them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherscope.layout import Partition
from fisherscope.linalg import PerSampleGradient, RunningSum
from fisherscope.linalg.scaling import LIMIT, are_sure, doubtful, exponent_of, is_in_range, unscaled

_TARGET = 30  # squares of gradients up to 2 ** 30 may be added up by the million, and 2 ** -63 is still exact


@dataclass
class Scale:
    """The power of two by which the gradients of one parameter are multiplied before they are squared.

    The first batch in which the parameter has any gradient fixes it, for the whole task.

    Attributes:
        exponent: of 2.
        is_fixed: whether there was such a batch.
    """

    exponent: int = 0
    is_fixed: bool = False

    def fix_by(self, rows: Tensor) -> None:
        """Fix it by the first values that are not all zero."""
        if not self.is_fixed and rows.numel():
            bound = float(rows.abs().max())
            self.is_fixed = 0 < bound < math.inf
            self.exponent = exponent_of(bound)


@dataclass
class Sinks:
    """Accumulators that want a pass over the normalised gradients; in units of the scale.

    Attributes:
        square: ``sum_i (2 ** k h_i) ** 2`` is added here.
        total: ``sum_i 2 ** k h_i`` is added here.
        scale: holds k.
    """

    square: RunningSum | None = None
    total: RunningSum | None = None
    scale: Scale = field(default_factory=Scale)

    @property
    def is_empty(self) -> bool:
        """Whether nobody wants anything."""
        return self.square is None and self.total is None

    def clear(self) -> None:
        """Forget what was added."""
        for into in (self.square, self.total):
            if into is not None:
                into.clear()


@dataclass(frozen=True)
class Squares:
    """Squared norms of the samples of a batch.

    Attributes:
        pieces: for each partition ``[n, pieces]``, float64.
        exponents: those of the powers of two with which each sample was measured, ``[n]`` int64 on the CPU;
            None where all are 0.
    """

    pieces: list[Tensor]
    exponents: Tensor | None = None


def measure(
    gradient: PerSampleGradient, factors: Tensor, partitions: Sequence[Partition | None], sinks: Sinks
) -> Squares:
    """``sum h ** 2`` over each piece of each partition; fills the sinks in the same pass.

    What float32 cannot hold of a sample's squares is computed once more with a power of two of its own.

    Args:
        gradient: g.
        factors: h_i = factors_i g_i, ``[n]``.
        partitions: of the parameter, None (the whole of it) among them.
        sinks: what is to be filled.
    """
    scale, at = sinks.scale, list(partitions).index(None)
    found = _one_pass(gradient, factors, partitions, sinks)
    if not sinks.is_empty and not scale.is_fixed and _fix(scale, gradient, factors, found[at]):
        sinks.clear()  # it held zeros before this batch, which is now measured in other units
        found = _one_pass(gradient, factors, partitions, sinks)
    pieces = [unscaled(values, 2 * scale.exponent) for values in found]
    if are_sure(found[at]):
        if scale.exponent == 0:
            return Squares(pieces)
        return Squares(pieces, torch.full((gradient.n,), scale.exponent, dtype=torch.int64, device="cpu"))
    own = _exponents(gradient, factors, default=scale.exponent)
    again = doubtful(found[at]).squeeze(1).cpu() & (own != scale.exponent)
    exponents = torch.where(again, own, scale.exponent)
    if again.any():
        _measure_again(gradient, factors, partitions, pieces, exponents, again)
    return Squares(pieces, exponents)


def _one_pass(
    gradient: PerSampleGradient, factors: Tensor, partitions: Sequence[Partition | None], sinks: Sinks
) -> list[Tensor]:
    normalised = gradient.scaled(factors * 2.0**sinks.scale.exponent)
    if sinks.is_empty:
        return normalised.norms(partitions)
    return normalised.accumulate(square=sinks.square, total=sinks.total, partitions=partitions)


def _fix(scale: Scale, gradient: PerSampleGradient, factors: Tensor, whole: Tensor) -> bool:
    """Fix a scale by a batch that has any gradient; whether it is another than that in use."""
    if not gradient.n:
        return False
    if is_in_range(float(whole.max())):
        scale.is_fixed = True
        return False
    bound = float((gradient.bounds() * factors.cpu().double()).max())
    if bound == 0 or not math.isfinite(bound):
        return False
    scale.exponent, scale.is_fixed = exponent_of(bound), True
    return scale.exponent != 0


def _exponents(gradient: PerSampleGradient, factors: Tensor, *, default: int) -> Tensor:
    """The exponents that bring each sample's bound to ``2 ** 30``, ``[n]`` int64 on the CPU.

    The default is that of a sample whose gradient is 0, or not finite.
    """
    bounds = gradient.bounds() * factors.cpu().double()
    exponents = _TARGET - torch.frexp(bounds)[1].long()
    known = bounds.isfinite() & (bounds > 0)
    return torch.where(known, exponents.clamp(-LIMIT, LIMIT), default)


def _measure_again(
    gradient: PerSampleGradient,
    factors: Tensor,
    partitions: Sequence[Partition | None],
    pieces: list[Tensor],
    exponents: Tensor,
    again: Tensor,
) -> None:
    """Replace the squares of some samples by those that have powers of two of their own."""
    powers = torch.exp2(exponents.double())
    found = gradient.scaled(factors * powers.to(factors)).balanced().norms(partitions)
    for values, better in zip(pieces, found, strict=True):
        chosen, units = again.to(values.device), powers.square().to(values)
        values[chosen] = (unscaled(better, 0) / units.unsqueeze(1))[chosen]
