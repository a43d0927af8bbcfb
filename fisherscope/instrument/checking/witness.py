"""What a proof keeps of a batch's per-sample gradients: random projections of each, and no gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector
from fisherscope.layout import Member
from fisherscope.store import SegmentWriter


@dataclass(frozen=True)
class Projected:
    """One parameter's gradients of a batch, contracted with a random vector along each axis but one.

    Attributes:
        members: the groups that the parameter adds to.
        by_axis: axis that stays -> ``[n, shape[axis]]``.
        squares: for each member the sum of squares of g per sample and piece, ``[n, pieces]`` float64.
        dots: for each member ``<g, theta>``, likewise.
    """

    members: tuple[Member, ...]
    by_axis: dict[int, Tensor]
    squares: list[Tensor]
    dots: list[Tensor]


class Witness(Collector):
    """Projects the gradients of one backward pass as they come.

    Attributes:
        labels: of which backward pass.
        draws: how many times sampled labels are drawn.
        draw: of label sources with several backward passes, the number of the one that is looked at.
        projected: what was found, by parameter.
    """

    def __init__(self, *, labels: str = "data", draws: int = 1, seed: int = 0) -> None:
        """Project with vectors that depend on the seed."""
        self.labels = labels
        self.draws = draws
        self.draw = 0
        self.seed = seed
        self.projected: dict[str, Projected] = {}

    def choose_draw(self, passes: int) -> None:
        """Say how many backward passes there will be, of which one is looked at."""
        self.draw = self.seed % passes

    @override
    def begin(self, n: int) -> None:
        self.projected.clear()

    @override
    def update(self, emission: Emission, segment: SegmentWriter | None, start: int) -> None:
        del segment, start
        name, shape = emission.parameter, emission.gradient.shape
        undo = emission.factors.double().square().reciprocal().unsqueeze(1)
        self.projected[name] = Projected(
            emission.members,
            {
                axis: emission.gradient.contracted(vector, axis).detach()
                for axis, vector in self.vectors(name, shape, emission.members, emission.gradient.device)
            },
            [values.double() * undo for values in emission.square_norms],
            [values.double() for values in emission.dots],
        )

    def vectors(
        self, name: str, shape: tuple[int, ...], members: tuple[Member, ...], device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """For each axis that stays, the vector of the shape of all others; the same for every call."""
        cut = {member.partition.axis for member in members if member.partition is not None}
        for axis in sorted(cut | ({0, 1} if len(shape) == 2 else {0})):
            content = hashlib.sha256(f"{self.seed} {name} {axis}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(content[:7], "little"))
            others = shape[:axis] + shape[axis + 1 :]
            vector = torch.randn(others, generator=generator, dtype=torch.float32, device="cpu")
            yield axis, (vector if others else torch.ones_like(vector)).to(device)

    def norms(self) -> Tensor:
        """The norm of each sample's whole gradient, to within a few per cent, ``[n]`` float64."""
        # of squares of float32 nothing would be left where gradients are below 1e-20
        sums = [p.by_axis[0].double().square().sum(1).cpu() for p in self.projected.values()]
        return torch.stack(sums).sum(0).sqrt()


def project(gradient: Tensor, vector: Tensor, axis: int) -> Tensor:
    """A gradient ``[*shape]`` contracted like those of the samples, ``[shape[axis]]`` float32."""
    moved = gradient.detach().movedim(axis, 0).float()
    return moved.flatten(1) @ vector.flatten() if moved.dim() > 1 else moved * vector


def theta_norms(parameter: nn.Parameter, members: tuple[Member, ...]) -> list[Tensor]:
    """The norm of the parameter's own values in each piece of each member, ``[pieces]`` float64."""
    from fisherscope.linalg import Dense

    own = Dense(parameter.detach().unsqueeze(0))
    return [values[0].double().sqrt() for values in own.norms([member.partition for member in members])]
