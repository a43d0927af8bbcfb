"""What a collection will take, before anything is run or written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fisherscope.instrument.data import Sample
from fisherscope.instrument.extensions import ExactPerToken, Fisher, Kronecker, Positions, SampleGradients
from fisherscope.instrument.options import CollectOptions
from fisherscope.layout import ModelLayout
from fisherscope.store.encodings import Encodings
from fisherscope.store.position_plan import side_of
from fisherscope.store.size import Lengths, bytes_per_sample, gradient_bytes, snapshot_bytes
from fisherscope.words import counted


@dataclass(frozen=True)
class Estimate:
    """Sizes of a planned collection, in bytes.

    Attributes:
        samples: number of samples over all tasks.
        bytes_per_sample: what one sample takes in the store, on average.
        gradient_bytes_per_sample: the part of it that is signed gradients.
        aggregate_bytes: Fisher and mean of all tasks together, as stored.
        disk_bytes: the whole store, with room for a second snapshot while one replaces another.
        accumulator_bytes: memory of the accumulators.
        memory_bytes: the most that the run takes beside the model: accumulators, and the largest batch. 0
            where the user sets the size of batches and nothing was measured.
        seconds: how long the run takes, measured on some of its batches; None where nothing was.
        cheaper: other encodings of gradients and the bytes on the disk with them, as far as they take fewer;
            where it was not looked at which inputs are shared, factors may take still less.
        tasks: number of samples of each task.
    """

    samples: int
    bytes_per_sample: int
    gradient_bytes_per_sample: int
    aggregate_bytes: int
    disk_bytes: int
    accumulator_bytes: int
    memory_bytes: int = 0
    seconds: float | None = None
    cheaper: tuple[tuple[str, int], ...] = ()
    tasks: Mapping[str, int] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """What there is, in words: quantity and amount."""
        found = [
            ("samples", f"{self.samples:,}"),
            ("one sample on disk", show_bytes(self.bytes_per_sample)),
            ("of which gradients", show_bytes(self.gradient_bytes_per_sample)),
            ("aggregates on disk", show_bytes(self.aggregate_bytes)),
            ("disk", show_bytes(self.disk_bytes)),
            ("memory of accumulators", show_bytes(self.accumulator_bytes)),
        ]
        if self.memory_bytes:
            found.append(("memory beside the model", show_bytes(self.memory_bytes)))
        if self.seconds is not None:
            found.append(("time", show_seconds(self.seconds)))
        found.extend((f"disk with {words}", show_bytes(size)) for words, size in self.cheaper)
        return found

    def __str__(self) -> str:
        return (
            f"{counted(self.samples, 'sample')} x {show_bytes(self.bytes_per_sample)} "
            f"(gradients {show_bytes(self.gradient_bytes_per_sample)}) + aggregates "
            f"{show_bytes(self.aggregate_bytes)} = {show_bytes(self.disk_bytes)} on disk, "
            f"{show_bytes(self.accumulator_bytes)} of accumulators"
            + (f", {show_bytes(self.memory_bytes)} of memory with a batch" if self.memory_bytes else "")
            + ("" if self.seconds is None else f", {show_seconds(self.seconds)}")
        )


def show_bytes(n: int) -> str:
    """Such as "17.35 MiB"."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def show_seconds(seconds: float) -> str:
    """Such as "3 h 05 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def estimate_bytes(
    layout: ModelLayout,
    parameters: tuple[str, ...],
    options: CollectOptions,
    samples: Mapping[str, Sequence[Sample]],
    encodings: Encodings | None = None,
    output_axes: Mapping[str, int] | None = None,
) -> Estimate:
    """Sizes of the store that these samples would make, up to page alignment and journal lines.

    Args:
        layout: of the model.
        parameters: the instrumented ones.
        options: of the collection.
        samples: by task.
        encodings: of the gradients; all dense by default.
        output_axes: of the weights of linear maps, whose gradients might be had in fewer bytes.
    """
    every = [sample for rows in samples.values() for sample in rows]
    count = max(len(every), 1)
    gradients, fisher = options.sample_gradients, options.fisher
    positions, kronecker = options.one_of(Positions), options.one_of(Kronecker)
    sizes = bytes_per_sample(
        layout,
        parameters,
        gradients.chosen(layout, parameters) if gradients else (),
        gradients.dtype if gradients else "bfloat16",
        mean_tokens=sum(sample.length for sample in every) / count,
        mean_labels=sum(len(sample.labels) for sample in every) / count,
        mean_text_bytes=sum(len((s.text or "").encode()) for s in every) / count * options.store_text,
        position_parameters=positions.chosen(layout, parameters) if positions else (),
        encodings=encodings,
        gradient_share=_gradient_share(gradients, samples),
    )
    full = {
        source
        for extension in (fisher, options.one_of(ExactPerToken))
        if extension is not None and extension.shape == "full"
        for source in (extension.labels if isinstance(extension, Fisher) else (extension.name,))
    }
    snapshot = snapshot_bytes(
        layout,
        parameters,
        fisher_shape="full" if full else "groups",
        labels=sorted(full),
        mean="data" in full,
        kronecker=kronecker.chosen(layout, parameters) if kronecker else (),
    )
    aggregates = math.ceil(snapshot["total"])
    disk = math.ceil(len(every) * sizes["total"]) + aggregates * (len(samples) + 1)
    saved = _savings(
        layout,
        parameters,
        options,
        samples,
        sizes["gradients"],
        encodings or Encodings(),
        output_axes or {},
    )
    return Estimate(
        samples=len(every),
        bytes_per_sample=math.ceil(sizes["total"]),
        gradient_bytes_per_sample=int(sizes["gradients"]),
        aggregate_bytes=aggregates * len(samples),
        disk_bytes=disk,
        accumulator_bytes=aggregates,
        tasks={name: len(rows) for name, rows in samples.items()},
        cheaper=tuple((words, disk - math.floor(len(every) * less)) for words, less in saved),
    )


def mean_lengths(samples: Mapping[str, Sequence[Sample]]) -> Lengths:
    """Of all samples together."""
    every = [sample for rows in samples.values() for sample in rows]
    count = max(len(every), 1)
    return Lengths(sum(s.length for s in every) / count, sum(len(s.labels) for s in every) / count)


def _gradient_share(gradients: SampleGradients | None, samples: Mapping[str, Sequence[Sample]]) -> float:
    """Of how many of the samples gradients are stored."""
    if gradients is None or gradients.max_samples is None:
        return 1.0
    kept = sum(min(len(rows), gradients.max_samples) for rows in samples.values())
    return kept / max(sum(map(len, samples.values())), 1)


def _savings(
    layout: ModelLayout,
    parameters: tuple[str, ...],
    options: CollectOptions,
    samples: Mapping[str, Sequence[Sample]],
    taken: float,
    known: Encodings,
    output_axes: Mapping[str, int],
) -> list[tuple[str, float]]:
    """Encodings with which gradients take fewer bytes: in words, and how many fewer for each sample."""
    gradients = options.sample_gradients
    stored = gradients.chosen(layout, parameters) if gradients else ()
    if gradients is None or not stored:
        return []
    lengths, share = mean_lengths(samples), _gradient_share(gradients, samples)
    maps = [n for n in stored if n in output_axes and side_of(layout, n) is not None]
    inputs = {name: known.inputs.get(name, name) for name in maps}
    transposed = tuple(name for name in maps if output_axes[name] == 1)
    low = [n for n in maps if gradients.rank * sum(s := layout.parameter(n).shape) < math.prod(s)]
    found = []
    for dtype in dict.fromkeys((gradients.dtype, "float16")):
        by_position = Encodings(dict.fromkeys(maps, "factored"), inputs, transposed, dtype=dtype)
        low_rank = Encodings(dict.fromkeys(low, "lowrank"), rank=gradients.rank, dtype=dtype)
        for words, encodings in (
            ('encoding="factored"', by_position),
            (f'encoding="lowrank", rank={gradients.rank}', low_rank),
        ):
            size = share * gradient_bytes(layout, stored, dtype, encodings, lengths)
            if size < 0.99 * taken:
                found.append((f'{words}, dtype="{dtype}"', taken - size))
    return [*sorted(found, key=lambda way: way[1]), ('encoding="groups"', taken)]
