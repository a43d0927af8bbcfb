"""The datasets of a segment: names, shapes and element types for ``n`` samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fisherscope.store.factor_plan import scale_name
from fisherscope.store.gradient_plan import BlockDataset, GradientPlan
from fisherscope.store.schema import StoreHeader
from fisherscope.store.skeleton import DatasetSpec

SAMPLE_COLUMNS = {
    "sample/row": "int64",
    "sample/length": "int32",
    "sample/tokens": "int32",
    "sample/loss": "float64",
    "sample/truncated": "int32",
}
RAGGED = {
    "ids": {"ids/input": "int32"},
    "labels": {"labels/ids": "int32"},
    "types": {"types/ids": "int32"},
    "text": {"text/bytes": "uint8"},
    "positions": {},  # the datasets are the header's
}
# what says how large a gradient is: its squared norm, or the norm, by the header's ``squares``
GROUP_SIZES = {"plain": "groups/square", "wide": "groups/norm"}
GROUP_DOT = "groups/dot"


@dataclass(frozen=True)
class SegmentPlan:
    """What a segment of some samples holds.

    Attributes:
        header: of the store.
        n: number of samples.
        offsets: per ragged family ("ids", "text") where each sample starts and the last ends, ``[n + 1]``.
        gradients: the gradient datasets, or None for a segment without.
    """

    header: StoreHeader
    n: int
    offsets: Mapping[str, NDArray[np.int64]]
    gradients: GradientPlan | None

    @classmethod
    def build(
        cls,
        header: StoreHeader,
        n: int,
        ragged: Mapping[str, Sequence[int]],
        *,
        gradients: bool,
    ) -> SegmentPlan:
        """Plan a segment.

        Args:
            header: of the store.
            n: number of samples.
            ragged: lengths of each sample by family. Where contributions of positions are stored and
                "positions" is not given, a sample has as many as "ids".
            gradients: False for samples of which no gradients are stored.

        Raises:
            ValueError: ragged lengths are not one per sample, or of an unknown family.
        """
        plan = header.gradients if gradients and header.gradient_parameters else None
        offsets = {}
        for family, lengths in _with_positions(header, ragged, plan).items():
            if family not in RAGGED:
                raise ValueError(f"unknown ragged datasets {family!r}: there are {sorted(RAGGED)}")
            sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
            if len(sizes) != n or (n and sizes.min() < 0):
                raise ValueError(f"{family!r} needs {n} lengths >= 0, one per sample, got {len(sizes)}")
            offsets[family] = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        return cls(header, n, offsets, plan)

    def first(self, rows: int) -> SegmentPlan:
        """The plan for the first ``rows`` samples only."""
        offsets = {family: values[: rows + 1] for family, values in self.offsets.items()}
        return SegmentPlan(self.header, rows, offsets, self.gradients)

    @cached_property
    def ragged(self) -> dict[str, str]:
        """The family of each ragged dataset."""
        fixed = {name: family for family in self.offsets for name in RAGGED[family]}
        found = fixed | {name: d.family for name, d in self.header.positions.by_name.items()}
        for rows in self.gradients.factors if self.gradients else ():
            if rows.family is not None:
                found |= {rows.name: rows.family, scale_name(rows.name): rows.family}
        return found

    @cached_property
    def head_major(self) -> frozenset[str]:
        """The datasets whose first axis runs over heads."""
        blocks = [d for d in self.gradients.datasets if isinstance(d, BlockDataset)] if self.gradients else []
        return frozenset(name for d in blocks for name in (d.name, scale_name(d.name)))

    @cached_property
    def specs(self) -> dict[str, DatasetSpec]:
        """Every dataset by name, in file order."""
        n, groups = self.n, len(self.header.groups)
        specs = [DatasetSpec(name, (n,), dtype) for name, dtype in SAMPLE_COLUMNS.items()]
        for family, offsets in self.offsets.items():
            specs.append(DatasetSpec(f"{family}/offsets", (n + 1,), "int64"))
            specs.extend(DatasetSpec(k, (int(offsets[-1]),), dtype) for k, dtype in RAGGED[family].items())
        columns = (GROUP_SIZES[self.header.squares], GROUP_DOT)
        specs.extend(DatasetSpec(name, (n, groups), "float32") for name in columns)
        for name, place in self.header.positions.by_name.items():
            specs.append(DatasetSpec(name, (int(self.offsets[place.family][-1]), place.columns), "float32"))
        if self.gradients:
            specs.extend(self._dense_specs(self.gradients))
            specs.extend(self._factor_specs(self.gradients))
        return {spec.name: spec for spec in specs}

    def _dense_specs(self, plan: GradientPlan) -> Iterator[DatasetSpec]:
        n, dtype = self.n, self.header.gradient_dtype
        for dataset in plan.datasets:
            is_block, shape = isinstance(dataset, BlockDataset), dataset.shape(n)
            spans = shape[0] if is_block else 1
            yield DatasetSpec(dataset.name, shape, dtype, spans)
            if dtype == "float16":
                scales = (*shape[:2], 1) if isinstance(dataset, BlockDataset) else shape[: -dataset.row_axes]
                yield DatasetSpec(scale_name(dataset.name), scales, "float32", spans)

    def _factor_specs(self, plan: GradientPlan) -> Iterator[DatasetSpec]:
        dtype = self.header.encodings.dtype
        for rows in plan.factors:
            total = 0 if rows.family is None else int(self.offsets[rows.family][-1])
            shape = rows.shape(self.n, total)
            yield DatasetSpec(rows.name, shape, dtype)
            if dtype == "float16":
                yield DatasetSpec(scale_name(rows.name), shape[:-1], "float32")
        for name in plan.errors.values():
            yield DatasetSpec(name, (self.n,), "float32")


def _with_positions(
    header: StoreHeader, ragged: Mapping[str, Sequence[int]], gradients: GradientPlan | None
) -> dict[str, Sequence[int]]:
    """The ragged families of a segment, with that of positions exactly where something lies along it."""
    needed = {dataset.family for dataset in header.positions.datasets.values()}
    needed |= gradients.families if gradients else set()
    families = {family: lengths for family, lengths in ragged.items() if family != "positions"}
    if "positions" in needed and (lengths := ragged.get("positions", ragged.get("ids"))) is not None:
        families["positions"] = lengths
    if lacking := needed - families.keys():
        raise ValueError(f"positions need the lengths of {sorted(lacking)}")
    return families
