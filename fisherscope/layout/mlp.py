"""Channels of MLPs, experts, and the rows of linear maps that are neither."""

from __future__ import annotations

from dataclasses import dataclass

from fisherscope.layout.partition import Partition


@dataclass(frozen=True)
class MlpLayout:
    """Channels of one MLP: channel c is a gate row, an up row and a down column.

    ``weights`` and ``biases`` are partitions of width 1 with one piece per channel; the down
    projection's bias belongs to no channel.
    """

    layer: int
    module: str
    weights: tuple[Partition, ...]
    biases: tuple[Partition, ...] = ()
    stack: str = "decoder"

    def __post_init__(self) -> None:
        _same_length(self.module, self.partitions, "channels")

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """Those of the weights, then those of the biases."""
        return (*self.weights, *self.biases)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.weights[0])


@dataclass(frozen=True)
class ExpertsLayout:
    """Experts of one mixture, whose weights are stacked in parameters with a leading expert axis.

    ``weights`` and ``biases`` are partitions of width 1 along that axis, one piece per expert.
    """

    layer: int
    module: str
    weights: tuple[Partition, ...]
    biases: tuple[Partition, ...] = ()
    stack: str = "decoder"

    def __post_init__(self) -> None:
        _same_length(self.module, self.partitions, "experts")

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """Those of the weights, then those of the biases."""
        return (*self.weights, *self.biases)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.weights[0])


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


def _same_length(module: str, partitions: tuple[Partition, ...], what: str) -> None:
    lengths = {len(partition) for partition in partitions}
    if len(lengths) != 1:
        raise ValueError(f"{module}: partitions disagree on the number of {what}: {sorted(lengths)}")
