"""The loop over tasks and batches that fills a store, and resumes where it stopped."""

from __future__ import annotations

import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fisherscope.errors import FisherscopeError, Interrupted, StoreError
from fisherscope.instrument.cadence import Cadence, Pace
from fisherscope.instrument.checking.probe import Prober, probe_samples
from fisherscope.instrument.checking.proving import Proofs
from fisherscope.instrument.checking.schedule import Schedule
from fisherscope.instrument.checks import check_rows
from fisherscope.instrument.extensions import Collector
from fisherscope.instrument.extensions.group_values import GroupValues
from fisherscope.instrument.first_checks import check_samples, compute_error
from fisherscope.instrument.memory import is_out_of_memory, release
from fisherscope.instrument.planning import RunPlan, TaskPlan
from fisherscope.instrument.progress import Progress
from fisherscope.instrument.sample_rows import put_samples, ragged_lengths
from fisherscope.instrument.signals import StopRequest
from fisherscope.store import SegmentWriter, StoreWriter

SEGMENT_BYTES = 64 << 20
SEGMENT_SECONDS = 60.0
SEALED_AHEAD = 2  # segments that may wait to be sealed while the next is computed
SNAPSHOT_SHARE = 0.1  # of the run's time, and of the bytes that it writes
SNAPSHOT_SECONDS = 900.0  # so much work is not risked, whatever a snapshot weighs


@dataclass
class Collection:
    """Everything that one run of the loop needs.

    Attributes:
        plan: what is to be done.
        writer: the open store.
        stop: set by a signal.
        progress: told about every batch.
        constants: arrays that hold for the whole store.
        prober: measures what the store will know its model by; None for a trial.
    """

    plan: RunPlan
    writer: StoreWriter
    stop: StopRequest
    progress: Progress
    constants: dict[str, Tensor]
    prober: Prober | None = None
    _pace: Pace = field(default_factory=Pace, init=False)
    _cadence: Cadence = field(init=False)
    _done: set[int] = field(default_factory=set, init=False)
    _covered: set[int] = field(default_factory=set, init=False)
    _parts: int = field(default=1, init=False)
    _applied: list[int] = field(default_factory=list, init=False)
    _proofs: Proofs = field(init=False)

    def __post_init__(self) -> None:
        options = self.plan.options
        batches = sum(len(self.plan.share(task)) for task in self.plan.tasks)
        schedule = Schedule(options.check, batches, options.seed)
        self._proofs = Proofs(self.plan.batch_pass, self.plan.objective, schedule, force=options.force)
        self._cadence = Cadence(SNAPSHOT_SHARE, SNAPSHOT_SECONDS, self.plan.estimate.accumulator_bytes)

    def run(self) -> None:
        """Collect every task that is not complete.

        Raises:
            Interrupted: a signal asked to stop; what was done is committed.
        """
        new = [task for task in self.plan.tasks if not self.writer.committed_rows(task.name)]
        if new:
            check_samples(self.plan, new)
        if len(new) == len(self.plan.tasks):
            self.writer.constants(self.constants | compute_error(self.plan) | self._probe())
        for task in self.plan.tasks:
            self._run_task(task)
        if self.stop.signal is not None:
            raise Interrupted(
                f"stopped by {signal.Signals(self.stop.signal).name} after the last batch: "
                f"{self.writer.path} is complete, there is nothing to resume",
                self.stop.signal,
            )

    def _probe(self) -> dict[str, Tensor]:
        """What the store will know its model by; nothing where it knows already."""
        if self.prober is None or self.writer.has_constants:
            return {}
        return self.prober.record(self.writer, probe_samples(self.plan.tasks, self.plan.options.seed))

    def _run_task(self, task: TaskPlan) -> None:
        committed = self.writer.committed_rows(task.name)
        covered = self._covered = self.writer.aggregated_batches(task.name)
        collectors, self._done = self.collectors(task)
        self._applied.clear()
        share = self.plan.share(task)
        self.progress.advance(task.name, sum(len(task.batches[b]) for b in covered.intersection(share)), 0)
        pending = [b for b in share if b not in covered]
        # rows that were committed after the last snapshot are done again for the aggregates alone
        redo = [b for b in pending if committed.issuperset(task.batches[b])]
        for b in redo:
            self.run_batch(task, b, collectors, None, 0)
            self._done.add(b)
            self._stop_if_asked(task, collectors)
        todo = [b for b in pending if b not in self._done]
        while todo:
            todo = todo[self.run_segment(task, self.next_segment(task, todo), collectors) :]
            if todo and self._cadence.is_due(self.writer.bytes_written):
                self.snapshot(task, collectors)
            self._stop_if_asked(task, collectors)
        if pending:
            self.snapshot(task, collectors)
        rows = {row for b in share for row in task.batches[b]}
        if missing := rows - self.writer.committed_rows(task.name):
            raise StoreError(
                f"{len(missing)} samples of task {task.name!r} are not in {self.writer.path} after the last "
                f"batch ({task.name}_{min(missing)} is the first): collect into a new directory"
            )

    def collectors(self, task: TaskPlan) -> tuple[list[Collector], set[int]]:
        """Collectors for a task with the state of this rank's last snapshot, and the batches it covers."""
        # group values go last: extensions before them may fill their sinks in the shared pass
        collectors = self.plan.collectors()
        collectors.append(GroupValues(self.plan.context))
        snapshot = self.writer.load_snapshot(task.name)
        if snapshot is None:
            return collectors, set()
        for collector in collectors:
            collector.load_state(snapshot.arrays)
        return collectors, set(snapshot.batches)

    def next_segment(self, task: TaskPlan, batches: Sequence[int]) -> list[int]:
        """The first of these batches which are sealed together: about 64 MiB, or a minute."""
        rows = 0
        group: list[int] = []
        for b in batches:
            if group and task.stores_gradients(b) != task.stores_gradients(group[0]):
                break
            group.append(b)
            rows += len(task.batches[b])
            size = rows * self.plan.bytes_per_sample(gradients=task.stores_gradients(b))
            if size >= SEGMENT_BYTES or self._pace.seconds(rows) >= SEGMENT_SECONDS:
                break
        return group

    def run_segment(self, task: TaskPlan, group: Sequence[int], collectors: list[Collector]) -> int:
        """Run some batches and have them committed; fewer when a signal arrives or they take too long.

        Returns:
            Batches done.
        """
        rows = [row for b in group for row in task.batches[b]]
        segment = self.writer.segment(
            task.name,
            rows,
            ragged=ragged_lengths(task, rows, store_text=self.plan.options.store_text),
            gradients=task.stores_gradients(group[0]),
        )
        start = done = 0
        begun = then = time.monotonic()
        try:
            for b in group:
                self.run_batch(task, b, collectors, segment, start)
                start += len(task.batches[b])
                done += 1
                now = time.monotonic()
                self._pace.add(len(task.batches[b]), now - then)
                then = now
                if self.stop.signal is not None or now - begun >= SEGMENT_SECONDS:
                    break
            segment.commit(start)
        except BaseException:
            segment.abort()
            raise
        self._done.update(group[:done])
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
            collectors[:], covered = self.collectors(task)
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
        size = self._at_once(task, number)
        try:
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                self._run_rows(task, part, number, collectors, segment, start + first)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # what the frames of the failed pass hold goes with them
            traceback.clear_frames(error.__traceback__)
        else:
            return True
        release(self.plan.context.device)
        return False

    def _at_once(self, task: TaskPlan, number: int) -> int:
        """How many samples of a batch run at once: a store may have been begun where more of them fit."""
        rows = task.batches[number]
        size = -(-len(rows) // self._parts)
        longest = task.samples[rows[0]].cost
        while not self.plan.limits.allow(size, longest):
            size -= 1
        return size

    def _halve(self, task: TaskPlan, number: int) -> None:
        """Run batches in twice as many parts from now on.

        Raises:
            FisherscopeError: a single sample is too large.
        """
        rows = task.batches[number]
        size = self._at_once(task, number)
        if size == 1:
            longest = max(task.samples[row].length for row in rows)
            raise FisherscopeError(
                f"memory does not suffice for one sample: {task.name}_{rows[0]} has {longest} positions. Cut "
                "samples with max_length, enable gradient checkpointing, instrument fewer parameters, or "
                'use Fisher(shape="groups")'
            )
        while (smaller := self._at_once(task, number)) == size:
            self._parts *= 2
        warnings.warn(
            f"memory ran out with {size} samples of task {task.name!r} at once: going on with {smaller}. "
            "memory_budget or batch_size set smaller batches from the start",
            stacklevel=2,
        )

    def _run_rows(
        self,
        task: TaskPlan,
        rows: Sequence[int],
        number: int,
        collectors: Sequence[Collector],
        segment: SegmentWriter | None,
        start: int,
    ) -> None:
        batch = self.plan.batch(task, rows)
        samples = [task.samples[row] for row in rows]
        proof = self._proofs.begin(task.name, number, samples, collectors)
        witnesses = () if proof is None else proof.witnesses
        losses = self.plan.batch_pass.run(batch, collectors, segment, start, witnesses)
        values = collectors[-1]
        if isinstance(values, GroupValues):
            groups = self.plan.context.groups.groups
            check_rows(values.square, lambda g: groups[g].parameter, batch)
        # nothing of the batch is committed before it has passed
        self._proofs.settle(proof, batch, samples, losses)
        if segment is not None:
            put_samples(segment, start, task, rows, losses, store_text=self.plan.options.store_text)

    def snapshot(self, task: TaskPlan, collectors: Sequence[Collector]) -> None:
        """Commit the aggregates of this rank's batches that are done."""
        begun = time.monotonic()
        arrays = {}
        for collector in collectors:
            arrays.update(collector.state())
        count = sum(len(task.batches[b]) for b in self._done)
        before = self.writer.bytes_written
        # beside the identity; batches after the last snapshot are run again, and proved again, by who resumes
        proved = self._proofs.take(task.name)
        self.writer.evidence("proof", proved.to_json(task.name, self.plan.options.check))
        self.writer.snapshot(task.name, self._done, count, arrays)
        self._cadence.taken(time.monotonic() - begun, self.writer.bytes_written - before)

    def _stop_if_asked(self, task: TaskPlan, collectors: Sequence[Collector]) -> None:
        share = self.plan.share(task)
        done = (self._done | self._covered).intersection(share)
        if self.stop.signal is None or len(done) == len(share):
            return
        self.snapshot(task, collectors)
        name = signal.Signals(self.stop.signal).name
        raise Interrupted(
            f"stopped by {name}: {len(done)} of {len(share)} batches of task "
            f"{task.name!r} are sealed in {self.writer.path}. The same command resumes: {resume_command()}",
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
