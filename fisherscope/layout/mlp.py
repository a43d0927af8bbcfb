"""Channels of MLPs, experts, and the rows of linear maps that are neither."""

from __future__ import annotations

from dataclasses import dataclass

from fisherscope.layout.partition import Partition


@dataclass(frozen=True)
class Pieces:
    """A module that is cut into pieces, each with its part of every parameter."""

    layer: int
    module: str
    weights: tuple[Partition, ...]
    biases: tuple[Partition, ...] = ()
    stack: str = "decoder"

    def __post_init__(self) -> None:
        lengths = {len(partition) for partition in self.partitions}
        if len(lengths) != 1:
            raise ValueError(f"{self.module}: partitions disagree on the number of pieces: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.weights[0])

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """Those of the weights, then those of the biases."""
        return (*self.weights, *self.biases)


@dataclass(frozen=True)
class MlpLayout(Pieces):
    """Channels of one MLP: channel c is a gate row, an up row and a down column.

    ``weights`` and ``biases`` are partitions of width 1 with one piece per channel, those of the expanding
    projections in the order of the pattern (gate, then up), that of the contracting one last; its bias
    belongs to no channel.

    What an adapter adds to an MLP is an entry of its own with the same channels, in as many of the
    projections as the adapter has; its ``block`` is not "mlp" but "mlp.default", say.
    """

    block: str = "mlp"

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self)


@dataclass(frozen=True)
class ExpertsLayout(Pieces):
    """Experts of one mixture, whose weights are stacked in parameters with a leading expert axis.

    ``weights`` and ``biases`` are partitions of width 1 along that axis, one piece per expert.
    """

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self)


@dataclass(frozen=True)
class RowsLayout:
    """Output features of a linear map whose role is not known: one piece of weight and bias per feature."""

    layer: int
    module: str
    weight: Partition
    bias: Partition | None = None
    stack: str = "decoder"

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """Those of weight and bias, as far as there are any."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)
