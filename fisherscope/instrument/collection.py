"""The loop over tasks and batches that fills a store, and resumes where it stopped."""

from __future__ import annotations

import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fisherscope.errors import FisherscopeError, Interrupted, StoreError
from fisherscope.instrument.checks import check_rows
from fisherscope.instrument.extensions import Collector
from fisherscope.instrument.extensions.group_values import GroupValues
from fisherscope.instrument.first_checks import check_gradients, compute_error
from fisherscope.instrument.memory import is_out_of_memory, release
from fisherscope.instrument.planning import RunPlan, TaskPlan
from fisherscope.instrument.progress import Progress
from fisherscope.instrument.sample_rows import put_samples, ragged_lengths
from fisherscope.instrument.signals import StopRequest
from fisherscope.store import SegmentWriter, StoreWriter

SEGMENT_BYTES = 64 << 20
SEGMENT_BATCHES = 16
SNAPSHOT_SHARE = 0.1


@dataclass
class Collection:
    """Everything that one run of the loop needs.

    Attributes:
        plan: what is to be done.
        writer: the open store.
        stop: set by a signal.
        progress: told about every batch.
        model_dtype: dtype of the model's weights, or that of the user's autocast.
        constants: arrays that hold for the whole store.
    """

    plan: RunPlan
    writer: StoreWriter
    stop: StopRequest
    progress: Progress
    model_dtype: torch.dtype
    constants: dict[str, Tensor]
    _snapshot_seconds: float = field(default=0.0, init=False)
    _snapshot_at: float = field(default_factory=time.monotonic, init=False)
    _parts: int = field(default=1, init=False)
    _applied: list[int] = field(default_factory=list, init=False)

    def run(self) -> None:
        """Collect every task that is not complete.

        Raises:
            Interrupted: a signal asked to stop; what was done is committed.
        """
        for task in self.plan.tasks:
            self.writer.declare_task(task.name, [sample.key for sample in task.samples])
        new = [task for task in self.plan.tasks if not self.writer.committed_rows(task.name)]
        if new:
            check_gradients(self.plan, new, self.model_dtype)
        if len(new) == len(self.plan.tasks):
            self.writer.constants(self.constants | compute_error(self.plan))
        for task in self.plan.tasks:
            self._run_task(task)
        if self.stop.signal is not None:
            raise Interrupted(
                f"stopped by {signal.Signals(self.stop.signal).name} after the last batch: "
                f"{self.writer.path} is complete, there is nothing to resume",
                self.stop.signal,
            )

    def _run_task(self, task: TaskPlan) -> None:
        committed = self.writer.committed_rows(task.name)
        collectors, covered = self.collectors(task)
        self._applied.clear()
        pending = [b for b in range(len(task.batches)) if b not in covered]
        done = len(covered)
        self.progress.advance(task.name, sum(len(task.batches[b]) for b in covered), 0)
        # rows that were committed after the last snapshot are done again for the aggregates alone
        redo = [b for b in pending if committed.issuperset(task.batches[b])]
        for b in redo:
            self.run_batch(task, b, collectors, None, 0)
            done += 1
            self._stop_if_asked(task, collectors, done)
        todo = [b for b in pending if b not in set(redo)]
        for group in self.segments(task, todo):
            done += self.run_segment(task, group, collectors)
            if self._snapshot_is_due() and done < len(task.batches):
                self.snapshot(task, collectors, done)
            self._stop_if_asked(task, collectors, done)
        if pending:
            self.snapshot(task, collectors, done)
        if missing := set(range(len(task.samples))) - self.writer.committed_rows(task.name):
            raise StoreError(
                f"{len(missing)} samples of task {task.name!r} are not in {self.writer.path} after the last "
                f"batch ({task.name}_{min(missing)} is the first): the store was begun with another plan of "
                "batches; collect into a new directory"
            )
        self.writer.complete(task.name)

    def collectors(self, task: TaskPlan) -> tuple[list[Collector], set[int]]:
        """Collectors for a task, with the state of its last snapshot, and the batches which that covers."""
        # group values go last: extensions before them may fill their sinks in the shared pass
        collectors = self.plan.collectors()
        collectors.append(GroupValues(self.plan.context))
        snapshot = self.writer.load_snapshot(task.name)
        if snapshot is None:
            return collectors, set()
        for collector in collectors:
            collector.load_state(snapshot.arrays)
        return collectors, set(snapshot.batches)

    def segments(self, task: TaskPlan, batches: Sequence[int]) -> Iterator[list[int]]:
        """Consecutive batches that are sealed together: about 64 MiB, or 16 batches."""
        group: list[int] = []
        size = 0
        for b in batches:
            group.append(b)
            size += self.plan.estimate.bytes_per_sample * len(task.batches[b])
            if size >= SEGMENT_BYTES or len(group) >= SEGMENT_BATCHES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def run_segment(self, task: TaskPlan, group: Sequence[int], collectors: list[Collector]) -> int:
        """Run and commit some batches; fewer than asked when a signal arrives.

        Returns:
            Batches done.
        """
        rows = [row for b in group for row in task.batches[b]]
        segment = self.writer.segment(
            task.name, rows, ragged=ragged_lengths(task, rows, store_text=self.plan.options.store_text)
        )
        start = done = 0
        try:
            for b in group:
                self.run_batch(task, b, collectors, segment, start)
                start += len(task.batches[b])
                done += 1
                if self.stop.signal is not None:
                    break
            segment.commit(start)
        except BaseException:
            segment.abort()
            raise
        return done

    def run_batch(
        self,
        task: TaskPlan,
        number: int,
        collectors: list[Collector],
        segment: SegmentWriter | None,
        start: int,
    ) -> None:
        """Run a batch, in smaller parts once memory has run out."""
        failed = None if self._attempt(task, number, collectors, segment, start) else number
        while failed is not None:
            self._halve(task, failed)
            # some parameters have had the samples of the batch that failed: begin at the last snapshot again
            collectors.clear()
            fresh, covered = self.collectors(task)
            collectors.extend(fresh)
            redo = [b for b in self._applied if b not in covered]
            failed = next((b for b in redo if not self._attempt(task, b, collectors, None, 0)), None)
            if failed is None and not self._attempt(task, number, collectors, segment, start):
                failed = number
        self._applied.append(number)
        self.progress.advance(task.name, len(task.batches[number]), self.writer.bytes_written)

    def _attempt(
        self,
        task: TaskPlan,
        number: int,
        collectors: Sequence[Collector],
        segment: SegmentWriter | None,
        start: int,
    ) -> bool:
        """Run a batch; False if memory does not suffice."""
        rows = task.batches[number]
        size = -(-len(rows) // self._parts)
        try:
            for first in range(0, len(rows), size):
                self._run_rows(task, rows[first : first + size], collectors, segment, start + first)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # what the frames of the failed pass hold goes with them
            traceback.clear_frames(error.__traceback__)
        else:
            return True
        release(self.plan.context.device)
        return False

    def _halve(self, task: TaskPlan, number: int) -> None:
        """Run batches in twice as many parts from now on.

        Raises:
            FisherscopeError: a single sample is too large.
        """
        rows = task.batches[number]
        size = -(-len(rows) // self._parts)
        if size == 1:
            longest = max(task.samples[row].length for row in rows)
            raise FisherscopeError(
                f"memory does not suffice for one sample: {task.name}_{rows[0]} has {longest} positions. Cut "
                "samples with max_length, enable gradient checkpointing, instrument fewer parameters, or "
                'use Fisher(shape="groups")'
            )
        self._parts *= 2
        smaller = -(-len(rows) // self._parts)
        warnings.warn(
            f"memory ran out with {size} samples of task {task.name!r} at once: going on with {smaller}. "
            "memory_budget or batch_size set smaller batches from the start",
            stacklevel=2,
        )

    def _run_rows(
        self,
        task: TaskPlan,
        rows: Sequence[int],
        collectors: Sequence[Collector],
        segment: SegmentWriter | None,
        start: int,
    ) -> None:
        batch = self.plan.batch(task, rows)
        losses = self.plan.batch_pass.run(batch, collectors, segment, start)
        values = collectors[-1]
        if isinstance(values, GroupValues):
            groups = self.plan.context.groups.groups
            check_rows(values.square, lambda g: groups[g].parameter, batch)
        if segment is not None:
            put_samples(segment, start, task, rows, losses, store_text=self.plan.options.store_text)

    def _snapshot_is_due(self) -> bool:
        """Snapshots may take a tenth of the run's time."""
        return time.monotonic() - self._snapshot_at >= self._snapshot_seconds / SNAPSHOT_SHARE

    def snapshot(self, task: TaskPlan, collectors: Sequence[Collector], done: int) -> None:
        """Commit the aggregates of the first ``done`` batches."""
        begun = time.monotonic()
        arrays = {}
        for collector in collectors:
            arrays.update(collector.state())
        batches = list(range(done))
        count = sum(len(task.batches[b]) for b in batches)
        self.writer.snapshot(task.name, batches, count, arrays)
        self._snapshot_at = time.monotonic()
        self._snapshot_seconds = self._snapshot_at - begun

    def _stop_if_asked(self, task: TaskPlan, collectors: Sequence[Collector], done: int) -> None:
        if self.stop.signal is None or done == len(task.batches):
            return
        self.snapshot(task, collectors, done)
        name = signal.Signals(self.stop.signal).name
        raise Interrupted(
            f"stopped by {name}: {done} of {len(task.batches)} batches of task {task.name!r} are sealed in "
            f"{self.writer.path}. The same command resumes: {resume_command()}",
            self.stop.signal,
        )


def resume_command() -> str:
    """The command line of this process, as it can be typed again."""
    if not sys.argv or not sys.argv[0]:
        return "the same call"
    script = Path(sys.argv[0])
    # `python -m package` leaves the path of the package's __main__.py in its place
    head = ["python", "-m", script.parent.name] if script.name == "__main__.py" else [sys.argv[0]]
    return shlex.join([*head, *sys.argv[1:]])
