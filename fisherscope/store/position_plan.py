"""Where the contributions of single positions lie in a segment, and whose positions they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fisherscope.layout import HeadBlock, ModelLayout
from fisherscope.layout.attention import KEY_VALUE_BLOCKS
from fisherscope.store.names import escape_path

Side = Literal["input", "target"]

FAMILIES: dict[Side, str] = {"input": "positions", "target": "labels"}


def side_of(layout: ModelLayout, parameter: str) -> Side | None:
    """Whose positions a layer runs over: those of the input, or those of an encoder-decoder's target.

    Returns:
        None where the layout does not say: a part of cross attention that is no block of heads.
    """
    if not has_two_sides(layout):
        return "input"
    stack = layout.parameter(parameter).stack
    if stack == "encoder":
        return "input"
    if layout.source == "modules":
        return None
    if stack != "cross":
        return "target"
    for _, block in layout.head_blocks():
        if any(partition.parameter == parameter for partition in block.partitions):
            return "input" if block.role in KEY_VALUE_BLOCKS else "target"
    return None


def has_two_sides(layout: ModelLayout) -> bool:
    """Whether the model has an encoder and a decoder."""
    return {"encoder", "decoder"} <= {info.stack for info in layout.parameters if info.layer >= 0}


@dataclass(frozen=True)
class PositionDataset:
    """Contributions of one matrix: a ragged dataset of rows, one per position of each sample.

    Column 0 is the whole matrix; behind it come the heads of each block.

    Attributes:
        name: of the dataset.
        parameter: the matrix.
        family: the ragged family whose offsets say where a sample's positions are.
        blocks: the blocks whose weight it is, or holds.
    """

    name: str
    parameter: str
    family: str
    blocks: tuple[HeadBlock, ...]

    @property
    def columns(self) -> int:
        """Values per position."""
        return 1 + sum(block.heads for block in self.blocks)

    def heads(self, name: str) -> slice:
        """The columns of a block's heads.

        Raises:
            KeyError: the matrix holds no such block.
        """
        start = 1
        for block in self.blocks:
            if block.name == name:
                return slice(start, start + block.heads)
            start += block.heads
        raise KeyError(
            f"{self.parameter!r} holds no heads of block {name!r}: it has {[b.name for b in self.blocks]}"
        )


@dataclass(frozen=True)
class PositionPlan:
    """The position datasets of a segment, by parameter, in the order of the layout."""

    datasets: dict[str, PositionDataset]

    @classmethod
    def build(cls, layout: ModelLayout, parameters: Iterable[str]) -> PositionPlan:
        """Plan the datasets for the contributions to ``parameters``.

        Raises:
            ValueError: one of them is no matrix, or it is not known whose positions it runs over.
        """
        chosen = set(parameters)
        datasets = {}
        for info in layout.parameters:
            if info.name not in chosen:
                continue
            side = side_of(layout, info.name)
            if len(info.shape) != 2 or side is None:
                raise ValueError(f"{info.name!r} is no matrix whose positions are known")
            blocks = tuple(b for _, b in layout.head_blocks() if b.weight.parameter == info.name)
            name = escape_path(f"positions/{info.name}")
            datasets[info.name] = PositionDataset(name, info.name, FAMILIES[side], blocks)
        return cls(datasets)

    @property
    def by_name(self) -> dict[str, PositionDataset]:
        """The datasets by their own names."""
        return {dataset.name: dataset for dataset in self.datasets.values()}
