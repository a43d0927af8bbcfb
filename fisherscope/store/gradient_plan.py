"""Where the gradients of each parameter lie in a segment: in head-major blocks, whole, or as factors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from fisherscope.layout import HeadBlock, ModelLayout, Partition
from fisherscope.store.encodings import Encodings
from fisherscope.store.factor_plan import (
    FactoredPlace,
    LowRankPlace,
    RowsDataset,
    factored_places,
    low_rank_places,
)
from fisherscope.store.names import escape_path


@dataclass(frozen=True)
class Piece:
    """The columns of a block dataset which hold one parameter's pieces.

    Attributes:
        partition: of the parameter into heads.
        part: "weight" or "bias".
        start: first column.
    """

    partition: Partition
    part: str
    start: int

    @property
    def stop(self) -> int:
        """Last column, exclusive."""
        return self.start + self.partition.slice_size


@dataclass(frozen=True)
class BlockDataset:
    """One (stack, layer, block): a dataset ``[heads, n, columns]``, weight first, bias behind it."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.pieces[0].partition)

    @property
    def columns(self) -> int:
        """Values per head and sample."""
        return self.pieces[-1].stop

    def shape(self, n: int) -> tuple[int, ...]:
        """Shape for ``n`` samples."""
        return (self.heads, n, self.columns)


@dataclass(frozen=True)
class WholeDataset:
    """A parameter without heads (or not covered by its heads): a dataset ``[n, *shape]``."""

    name: str
    parameter: str
    parameter_shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Values per sample."""
        return math.prod(self.parameter_shape)

    def shape(self, n: int) -> tuple[int, ...]:
        """Shape for ``n`` samples."""
        return (n, *self.parameter_shape)

    @property
    def row_axes(self) -> int:
        """How many of the last axes make a row: what has one scale in float16."""
        return max(1, len(self.parameter_shape) - 1)


Place: TypeAlias = tuple[tuple[BlockDataset, Piece], ...] | WholeDataset | FactoredPlace | LowRankPlace


@dataclass(frozen=True)
class GradientPlan:
    """The gradient datasets of a segment.

    Attributes:
        datasets: of dense gradients, in file order.
        factors: of factored ones and of those of low rank, in file order; a shared input comes once.
        places: for each stored parameter where it lies: for dense gradients the datasets that hold it and,
            where it is cut into heads, the piece in each.
    """

    datasets: tuple[BlockDataset | WholeDataset, ...]
    factors: tuple[RowsDataset, ...]
    places: dict[str, Place]

    @classmethod
    def build(
        cls, layout: ModelLayout, parameters: Iterable[str], encodings: Encodings | None = None
    ) -> GradientPlan:
        """Plan the datasets for the gradients of ``parameters``; by default all of them are dense."""
        encodings = encodings or Encodings()
        chosen = {name for name in parameters if encodings.encoding(name) == "dense"}
        in_blocks = {name for name in chosen if _covered(layout, name)}
        blocks: list[BlockDataset] = []
        for attention, block in layout.head_blocks():
            name = escape_path(f"gradients/{attention.stack}/{attention.layer}/{block.name}")
            if pieces := _pieces(block, in_blocks):
                blocks.append(BlockDataset(name, pieces))
        whole = [
            WholeDataset(escape_path(f"parameters/{info.name}"), info.name, info.shape)
            for info in layout.parameters
            if info.name in chosen - in_blocks
        ]
        places: dict[str, Place] = {
            name: tuple((b, piece) for b in blocks for piece in b.pieces if piece.partition.parameter == name)
            for name in in_blocks
        }
        places.update({dataset.parameter: dataset for dataset in whole})
        factored, low_rank = factored_places(layout, encodings), low_rank_places(layout, encodings)
        for place in factored:
            places[place.parameter] = place
        for low in low_rank:
            places[low.parameter] = low
        # neighbours in the file are read together: the input, then what goes with it
        rows = [rows for place in factored for rows in (place.input, place.output)]
        rows += [rows for low in low_rank for rows in (low.left, low.right)]
        return cls((*blocks, *whole), tuple(dict.fromkeys(rows)), places)

    @property
    def errors(self) -> dict[str, str]:
        """The dataset of relative errors of each parameter of low rank."""
        return {name: place.error for name, place in self.places.items() if isinstance(place, LowRankPlace)}

    @property
    def families(self) -> set[str]:
        """The ragged families along which something lies."""
        return {rows.family for rows in self.factors if rows.family is not None}


def _pieces(block: HeadBlock, stored: set[str]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    start = 0
    for part, partition in (("weight", block.weight), ("bias", block.bias)):
        if partition is not None and partition.parameter in stored:
            pieces.append(Piece(partition, part, start))
            start = pieces[-1].stop
    return tuple(pieces)


def _covered(layout: ModelLayout, parameter: str) -> bool:
    """Whether the head slices of a parameter hold each of its entries exactly once."""
    partitions = [
        partition
        for _, block in layout.head_blocks()
        for partition in (block.weight, block.bias)
        if partition is not None and partition.parameter == parameter
    ]
    if not partitions or len({p.axis for p in partitions}) != 1:
        return False
    indices = sorted(i for p in partitions for start in p.starts for i in range(start, start + p.width))
    return indices == list(range(partitions[0].shape[partitions[0].axis]))
