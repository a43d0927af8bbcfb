"""Per sample and group: sum of g ** 2 and <g, theta>. Always collected, whatever else is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from fisherscope.errors import NonFiniteError
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context
from fisherscope.linalg import Moments
from fisherscope.store import SegmentWriter

_SMALLEST = 1e-35  # of a gradient's norm: normal numbers of float32 begin at 1.2e-38


class GroupValues(Collector):
    """Reduces each parameter's gradients over its heads, channels and as a whole, after squaring.

    The rows carry bootstrap, Taylor and importance analyses without the model. Their moments are kept in
    float64 as running aggregates, too, which cover the same samples as the Fisher of a snapshot.
    """

    def __init__(self, context: Context) -> None:
        """Nothing is allocated before the first batch."""
        self._context = context
        self._size = len(context.groups)
        self._device = context.device
        self._moments = Moments.empty(self._size)
        self.square = self.dot = torch.empty(0, dtype=torch.float32, device="cpu")
        self._normalised = torch.empty(0, dtype=torch.float32, device="cpu")

    @override
    def begin(self, n: int) -> None:
        self.square, self.dot, self._normalised = (group_zeros(n, self._size, self._device) for _ in range(3))

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        undo = emission.factors.to(self.square).square().reciprocal().unsqueeze(1)
        for member, norms, dots in zip(emission.members, emission.square_norms, emission.dots, strict=True):
            columns = slice(member.first, member.first + norms.shape[1])
            # several parameters add to one channel
            squares = norms.to(self.square.device)
            self._normalised[:, columns] += squares
            self.square[:, columns] += squares * undo
            self.dot[:, columns] += dots.to(self.dot.device)

    @override
    def end(self, segment: SegmentWriter | None, start: int) -> None:
        self._moments = self._moments.merge(Moments.of(self._normalised.cpu().numpy()))
        if segment is not None:
            self._check_range()
            # the root: float32 holds the norm of any gradient that it holds, and the squares of few
            segment.put("groups/norm", start, self.square.sqrt().float().cpu())
            segment.put("groups/dot", start, self.dot.float().cpu())

    def _check_range(self) -> None:
        """That float32 holds the inner products, and that gradients are no smaller than its normal numbers.

        Raises:
            NonFiniteError: an inner product with the weights is too large.
        """
        groups = self._context.groups.groups
        # gradients that are not finite are named with their sample
        large = (self.dot.abs() > torch.finfo(torch.float32).max) & self.square.isfinite()
        if large.any():
            group = groups[int(large.nonzero()[0, 1])]
            raise NonFiniteError(
                f"<g, theta> of {group.parameter} is beyond what float32 holds: multiply the losses by a "
                "power of two that brings gradients near 1"
            )
        small = (self.square > 0) & (self.square < _SMALLEST**2)
        whole = torch.tensor(
            [group.kind == "parameter" for group in groups], dtype=torch.bool, device=small.device
        )
        if (small & whole).any():
            name = groups[int((small & whole).nonzero()[0, 1])].parameter
            self._context.warn_once(
                f"gradients with respect to {name} are below {_SMALLEST:.0e}, where float32 has few digits "
                "or none, in the backward pass, too (other parameters may be like it): multiply the losses "
                "by a power of two that brings gradients near 1"
            )

    @override
    def state(self) -> dict[str, Tensor]:
        return {
            "moments/count": torch.tensor([self._moments.count], dtype=torch.int64, device="cpu"),
            "moments/mean": torch.from_numpy(self._moments.mean.copy()),
            "moments/m2": torch.from_numpy(self._moments.m2.copy()),
        }

    @override
    def load_state(self, arrays: Mapping[str, Tensor]) -> None:
        self._moments = Moments(
            int(arrays["moments/count"]),
            arrays["moments/mean"].numpy().copy(),
            arrays["moments/m2"].numpy().copy(),
        )


def group_zeros(n: int, groups: int, device: torch.device) -> Tensor:
    """Zeros in float64, ``[n, groups]``, on the device where that has float64."""
    where = torch.device("cpu") if device.type == "mps" else device
    return torch.zeros(n, groups, dtype=torch.float64, device=where)
