"""Which position carries a sample's gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.errors import CoverageError, NonFiniteError
from fisherscope.instrument.by_position import ByPosition
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context, Extension
from fisherscope.instrument.extensions.choice import Choice, checked_choice, chosen_weights, none_chosen
from fisherscope.instrument.extensions.registry import register_extension
from fisherscope.layout import ModelLayout, Partition
from fisherscope.linalg import Factored
from fisherscope.store import SegmentWriter
from fisherscope.store.position_plan import PositionDataset, PositionPlan, side_of

_LARGEST = 1e37  # of squared norms, with room for the contributions that cancel in them
_SMALLEST = 1e-33  # with room for contributions that are a small part of them


@register_extension
@dataclass(frozen=True)
class Positions(Extension):
    """What each position adds to a sample's squared gradient norm, ``c_t = <d_t a_t', g>``.

    Per sample, position and matrix: signed, and adding up to ``||g||^2`` over the positions. Beside the whole
    matrix there is a value for each head of the blocks that it holds. In the decoder of an encoder-decoder
    positions are those of the target. The bias is left out: its gradient is not one of the matrix.

    Attributes:
        parameters: "attention", "all" (linear maps of MLPs and other mixers of the layers, too) or a list of
            name patterns; of the instrumented ones.
    """

    name: ClassVar[str] = "position_contributions"
    parameters: Choice = "attention"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", checked_choice("Positions", self.parameters))

    def chosen(self, layout: ModelLayout, instrumented: tuple[str, ...]) -> tuple[str, ...]:
        """The matrices whose contributions are stored.

        Raises:
            CoverageError: there is none.
        """
        matrices = chosen_weights(layout, instrumented, self.parameters)
        names = tuple(name for name in matrices if side_of(layout, name) is not None)
        if not names:
            raise none_chosen("Positions", self.parameters, instrumented)
        return names

    @override
    def collector(self, context: Context) -> Collector:
        names = self.chosen(context.layout, tuple(context.parameters))
        return PositionCollector(PositionPlan.build(context.layout, names))


class PositionCollector(Collector):
    """Writes the contributions of each matrix as its gradients come."""

    def __init__(self, plan: PositionPlan) -> None:
        """Collect what the segments have room for."""
        self._datasets = plan.datasets
        self._warned = False

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        place = self._datasets.get(emission.parameter)
        if place is None or segment is None:
            return
        lengths = segment.lengths(place.name, start, len(emission.batch))
        found = emission.by_position
        if isinstance(found, ByPosition):
            values = _of_samples(found, place, lengths)
            self._check_range(emission)
        elif not emission.is_zero:
            raise _refusal(emission.parameter, found.reason)
        else:
            # the loss does not depend on it
            values = [
                torch.zeros(length, place.columns, dtype=torch.float32, device="cpu") for length in lengths
            ]
        segment.put_ragged(place.name, start, values)

    def _check_range(self, emission: Emission) -> None:
        """Contributions are squares in float32, of which it holds those between 1e-38 and 3e38.

        Raises:
            NonFiniteError: those of a sample are larger.
        """
        whole = [member.partition for member in emission.members].index(None)
        squares = emission.square_norms[whole].squeeze(1).cpu() / emission.factors.cpu().double().square()
        advice = (
            "multiply the losses by a power of two that brings gradients near 1, or leave the parameter out "
            "with Positions(parameters=[...])"
        )
        if (large := squares > _LARGEST).any():
            sample = emission.batch.sample_id(int(large.nonzero()[0, 0]))
            raise NonFiniteError(
                f"the position contributions of {emission.parameter} to {sample} are squares beyond what "
                f"float32 holds: {advice}"
            )
        small = (squares > 0) & (squares < _SMALLEST)
        if small.any() and not self._warned:
            self._warned = True
            first = int(small.nonzero()[0, 0])
            warnings.warn(
                f"the position contributions of {emission.parameter} to {emission.batch.sample_id(first)} "
                f"add up to {float(squares[first]):.1g}, of which float32 holds few digits or none (others "
                f"may be like it): {advice}",
                stacklevel=2,
            )


def _of_samples(found: ByPosition, place: PositionDataset, lengths: list[int]) -> list[Tensor]:
    """``[positions, columns]`` of each sample, without padding."""
    partitions = [None, *(block.weight for block in place.blocks)]
    by_use = torch.unflatten(contributions(found.gradient, partitions), 1, (found.uses, -1))
    values, attended = by_use.sum(1).cpu(), found.attended.cpu()
    samples = []
    for sample, mask, length in zip(values, attended, lengths, strict=True):
        mine = sample[mask]
        if place.family == "labels":
            # what stands behind the last label that bears loss changes nothing
            mine = torch.nn.functional.pad(mine, (0, 0, 0, length - len(mine)))
        if len(mine) != length:
            raise _refusal(
                place.parameter, f"its layer sees {len(mine)} positions of a sample that has {length}"
            )
        samples.append(mine)
    return samples


def contributions(gradient: Factored, partitions: list[Partition | None]) -> Tensor:
    """``<l_t r_t', g>`` with ``g = sum_t l_t r_t'``, per sample and position, over each piece of partitions.

    Returns:
        ``[n, T, pieces]`` float32, the pieces of all partitions in order; None stands for the whole.
    """
    along = [p.axis for p in partitions if p is not None]
    marginals: dict[int, Tensor] = {}
    pieces = []
    for partition in partitions:
        axis = (along or [0])[0] if partition is None else partition.axis
        if axis not in marginals:
            marginals[axis] = _by_index(gradient, axis)
        values = marginals[axis]
        pieces.append(values.sum(2, keepdim=True) if partition is None else partition.sums(values))
    return torch.cat(pieces, 2).float()


def _by_index(gradient: Factored, axis: int) -> Tensor:
    """Contributions per index of one axis, ``[n, T, shape[axis]]``: l_tk (g r_t)_k, or r_tk (g' l_t)_k."""
    cut, kept = (gradient.left, gradient.right) if axis == 0 else (gradient.right, gradient.left)
    if cut.dtype.itemsize < 4:
        cut, kept = cut.float(), kept.float()
    positions, (rows, columns) = gradient.positions, gradient.shape
    if positions * (rows + columns) <= 2 * rows * columns:
        # sum_s (kept_t . kept_s) cut_s, without forming g
        return cut * torch.bmm(torch.bmm(kept, kept.mT), cut)
    out = torch.empty_like(cut)
    for mine, other, result in zip(cut, kept, out, strict=True):
        torch.mul(mine, other @ (other.T @ mine), out=result)
    return out


def _refusal(parameter: str, reason: str) -> CoverageError:
    return CoverageError(
        f"there are no position contributions of {parameter}: {reason}. Leave it out with "
        "Positions(parameters=[...]), a list of name patterns"
    )
