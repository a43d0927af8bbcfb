"""What a collection will take, before anything is run or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fisherscope.instrument.data import Sample
from fisherscope.layout import ModelLayout
from fisherscope.store.size import bytes_per_sample, snapshot_bytes


@dataclass(frozen=True)
class Estimate:
    """Sizes of a planned collection, in bytes.

    Attributes:
        samples: number of samples over all tasks.
        bytes_per_sample: what one sample takes in the store, on average.
        gradient_bytes_per_sample: the part of it that is signed gradients.
        aggregate_bytes: Fisher and mean of all tasks together, as stored.
        disk_bytes: the whole store, with room for a second snapshot while one replaces another.
        accumulator_bytes: memory of the accumulators, beside the model and a batch's activations.
    """

    samples: int
    bytes_per_sample: int
    gradient_bytes_per_sample: int
    aggregate_bytes: int
    disk_bytes: int
    accumulator_bytes: int

    def __str__(self) -> str:
        def show(n: int) -> str:
            return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"

        return (
            f"{self.samples} samples x {show(self.bytes_per_sample)} "
            f"(gradients {show(self.gradient_bytes_per_sample)}) + aggregates {show(self.aggregate_bytes)} "
            f"= {show(self.disk_bytes)} on disk, {show(self.accumulator_bytes)} of accumulators"
        )


def estimate_bytes(
    layout: ModelLayout,
    parameters: Sequence[str],
    gradient_parameters: Sequence[str],
    *,
    gradient_dtype: str,
    full_fisher: bool,
    samples: Mapping[str, Sequence[Sample]],
    store_text: bool,
) -> Estimate:
    """Sizes of the store that these samples would make, up to page alignment and journal lines."""
    count = sum(len(rows) for rows in samples.values())
    every = [sample for rows in samples.values() for sample in rows]
    sizes = bytes_per_sample(
        layout,
        parameters,
        gradient_parameters,
        gradient_dtype,
        mean_tokens=sum(sample.length for sample in every) / max(count, 1),
        mean_labels=sum(len(sample.labels) for sample in every) / max(count, 1),
        mean_text_bytes=sum(len((s.text or "").encode()) for s in every) / max(count, 1) * store_text,
    )
    snapshot = int(
        snapshot_bytes(layout, parameters, fisher_shape="full" if full_fisher else "groups")["total"]
    )
    return Estimate(
        samples=count,
        bytes_per_sample=math.ceil(sizes["total"]),
        gradient_bytes_per_sample=int(sizes["gradients"]),
        aggregate_bytes=snapshot * len(samples),
        disk_bytes=math.ceil(count * sizes["total"]) + snapshot * (len(samples) + 1),
        accumulator_bytes=snapshot,
    )
