"""A few of a run's batches, run and written for real, to tell how long all of them will take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from fisherscope.instrument.collection import SNAPSHOT_SHARE, Collection
from fisherscope.instrument.first_checks import check_samples
from fisherscope.instrument.guards import random_state
from fisherscope.instrument.memory import PeakMemory
from fisherscope.instrument.planning import RunPlan, TaskPlan
from fisherscope.instrument.prepared import prepared
from fisherscope.instrument.signals import StopRequest
from fisherscope.store import StoreHeader, StoreWriter

_BATCHES = 4


@dataclass
class _Clock:
    """Notes when each batch has ended."""

    ends: list[float] = field(default_factory=list)

    def advance(self, task: str, samples: int, written: int) -> None:
        del task, samples, written
        self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class Trial:
    """What was measured.

    Attributes:
        seconds: of the whole run, without reading its tasks and hashing the model.
        memory_bytes: the most that was taken beside the model; None where the machine cannot say.
    """

    seconds: float
    memory_bytes: int | None


def try_run(
    plan: RunPlan,
    header: StoreHeader,
    constants: dict[str, Tensor],
    directory: Path | None = None,
) -> Trial:
    """Run some batches of a plan, the largest among them, into a store that is thrown away.

    Args:
        plan: of the run.
        header: of its store.
        constants: as of the run.
        directory: on the disk that the run will write to; by default where temporary files go.
    """
    options, clock = plan.options, _Clock()
    with tempfile.TemporaryDirectory(dir=directory, prefix=".estimate-") as scratch:
        path = Path(scratch) / "run.fs"
        with (
            StoreWriter.open(path, header, durability=options.durability) as writer,
            random_state(options.seed, deterministic=options.deterministic),
            prepared(plan.batch_pass.model),
            PeakMemory(plan.context.device) as memory,
        ):
            plan = plan.settled(writer)
            collection = Collection(plan, writer, StopRequest(), clock, constants)
            seconds = _Stopwatch(plan, collection, clock).seconds()
    return Trial(seconds, memory.bytes)


@dataclass
class _Stopwatch:
    plan: RunPlan
    collection: Collection
    clock: _Clock

    def seconds(self) -> float:
        """Of all batches, commits and snapshots, from those of a few."""
        tasks = self.plan.tasks
        begun = time.perf_counter()
        check_samples(self.plan, tasks)
        total = time.perf_counter() - begun
        task = max(tasks, key=lambda task: _positions(task, task.batches[0]))
        numbers = _spread(len(task.batches))
        collectors, _ = self.collection.collectors(task)
        self.collection.run_batch(task, numbers[0], collectors, None, 0)  # caches and threads warm up
        self.clock.ends.clear()
        begun = time.perf_counter()
        self.collection.run_segment(task, numbers, collectors)
        committed = time.perf_counter()
        self.collection.snapshot(task, collectors)
        snapshot = time.perf_counter() - committed
        sizes = [_positions(task, task.batches[number]) for number in numbers]
        durations = np.diff([begun, *self.clock.ends]).tolist()
        for each in tasks:
            batches = _interpolated(sizes, durations, [_positions(each, rows) for rows in each.batches])
            commits = self._commits(each)
            # between snapshots there is a multiple of the time that one takes
            snapshots = min(commits, 1 + sum(batches) * SNAPSHOT_SHARE / max(snapshot, 1e-9))
            total += sum(batches) + commits * (committed - self.clock.ends[-1]) + snapshots * snapshot
        return total

    def _commits(self, task: TaskPlan) -> int:
        """How many segments a task makes."""
        left, commits = list(range(len(task.batches))), 0
        while left:
            left = left[len(self.collection.next_segment(task, left)) :]
            commits += 1
        return commits


def _spread(batches: int) -> list[int]:
    """Numbers of a few batches from the first, the largest, to the last."""
    return sorted({round(place) for place in np.linspace(0, batches - 1, min(_BATCHES, batches)).tolist()})


def _positions(task: TaskPlan, rows: Sequence[int]) -> int:
    """Padded positions of a batch."""
    return len(rows) * max(task.samples[row].length for row in rows)


def _interpolated(sizes: Sequence[int], durations: Sequence[float], wanted: Sequence[int]) -> list[float]:
    """Durations at other sizes, by a straight line through those measured that does not fall below zero."""
    if len(set(sizes)) == 1:
        return [size / sizes[0] * float(np.mean(durations)) for size in wanted]
    slope, offset = np.polyfit(sizes, durations, 1)
    if slope <= 0:
        return [float(np.mean(durations))] * len(wanted)
    return [max(float(slope * size + offset), float(slope * size)) for size in wanted]
