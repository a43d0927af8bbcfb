"""Where the factors of gradients that are not dense lie in a segment."""

from __future__ import annotations

from dataclasses import dataclass

from fisherscope.layout import ModelLayout
from fisherscope.store.encodings import Encodings
from fisherscope.store.names import escape_path
from fisherscope.store.position_plan import FAMILIES, side_of


@dataclass(frozen=True)
class RowsDataset:
    """One factor of some matrix: rows, each with a scale of its own where it is float16.

    Attributes:
        name: of the dataset.
        columns: values per row.
        family: the ragged family whose offsets say which rows are a sample's; None where each sample has
            ``rows`` of them.
        rows: of each sample, where that is the same for all.
    """

    name: str
    columns: int
    family: str | None = None
    rows: int = 0

    def shape(self, n: int, total: int) -> tuple[int, ...]:
        """Shape for ``n`` samples with ``total`` entries of the family."""
        return (n, self.rows, self.columns) if self.family is None else (total, self.columns)


@dataclass(frozen=True)
class FactoredPlace:
    """A gradient as a sum over positions, ``g = sum_t d_t a_t'``.

    Attributes:
        parameter: the matrix.
        input: the rows a, which other parameters may have in common.
        output: the rows d.
        output_axis: the axis of the matrix that runs over d.
    """

    parameter: str
    input: RowsDataset
    output: RowsDataset
    output_axis: int

    @property
    def left(self) -> RowsDataset:
        """The factor of axis 0."""
        return self.output if self.output_axis == 0 else self.input

    @property
    def right(self) -> RowsDataset:
        """The factor of axis 1."""
        return self.input if self.output_axis == 0 else self.output


@dataclass(frozen=True)
class LowRankPlace:
    """A gradient as ``rank`` outer products, and its relative error.

    Attributes:
        parameter: the matrix.
        left, right: factors of axis 0 and 1.
        error: name of the dataset of errors, float32 ``[n]``.
    """

    parameter: str
    left: RowsDataset
    right: RowsDataset
    error: str


def scale_name(dataset: str) -> str:
    """Name of the dataset that holds the scales of a float16 dataset."""
    return f"scales/{dataset}"


def factored_places(layout: ModelLayout, encodings: Encodings) -> list[FactoredPlace]:
    """Where factored gradients lie, in the order of the layout."""
    places = []
    for info in layout.parameters:
        if encodings.of.get(info.name) != "factored":
            continue
        side, axis = side_of(layout, info.name), encodings.output_axis(info.name)
        assert side is not None  # Encodings.check
        shared = encodings.inputs[info.name]
        family = FAMILIES[side]
        given = RowsDataset(escape_path(f"factors/input/{shared}"), info.shape[1 - axis], family)
        returned = RowsDataset(escape_path(f"factors/output/{info.name}"), info.shape[axis], family)
        places.append(FactoredPlace(info.name, given, returned, axis))
    return places


def low_rank_places(layout: ModelLayout, encodings: Encodings) -> list[LowRankPlace]:
    """Where gradients of low rank lie, in the order of the layout."""
    places = []
    for info in layout.parameters:
        if encodings.of.get(info.name) != "lowrank":
            continue
        assert encodings.rank is not None
        left, right = (
            RowsDataset(escape_path(f"lowrank/{side}/{info.name}"), size, rows=encodings.rank)
            for side, size in zip(("left", "right"), info.shape, strict=True)
        )
        places.append(LowRankPlace(info.name, left, right, escape_path(f"lowrank/error/{info.name}")))
    return places
