"""The loop over tasks and batches that fills a store, and resumes where it stopped."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fisherscope.errors import Interrupted, StoreError
from fisherscope.instrument.batch import Batch, make_batch
from fisherscope.instrument.checks import check_against_autograd, check_independence, check_rows
from fisherscope.instrument.data import Sample
from fisherscope.instrument.extensions import Collector, Extension
from fisherscope.instrument.extensions.base import Context
from fisherscope.instrument.extensions.group_values import GroupValues
from fisherscope.instrument.passes import BatchPass
from fisherscope.instrument.progress import Progress
from fisherscope.instrument.signals import StopRequest
from fisherscope.store import SegmentWriter, StoreWriter

_SEGMENT_BYTES = 64 << 20
_SEGMENT_BATCHES = 16
_SNAPSHOT_SHARE = 0.1


@dataclass(frozen=True)
class TaskPlan:
    """One task and its batches.

    Attributes:
        name: of the task.
        samples: in row order.
        batches: row numbers of each batch.
    """

    name: str
    samples: Sequence[Sample]
    batches: Sequence[tuple[int, ...]]


@dataclass
class Collection:
    """Everything that one run of the loop needs.

    Attributes:
        batch_pass: runs a batch.
        context: what collectors may know.
        extensions: the quantities to collect.
        writer: the open store.
        pad_id, pad_side: how batches are padded.
        store_text: whether the texts of samples are written.
        row_bytes: bytes that one sample takes in the store, for sealing segments by size.
        stop: set by a signal.
        progress: told about every batch.
        independence_tolerance_dtype: dtype of the model's weights.
    """

    batch_pass: BatchPass
    context: Context
    extensions: Sequence[Extension]
    writer: StoreWriter
    pad_id: int
    pad_side: Literal["left", "right"]
    store_text: bool
    row_bytes: int
    stop: StopRequest
    progress: Progress
    model_dtype: torch.dtype
    _snapshot_seconds: float = field(default=0.0, init=False)
    _snapshot_at: float = field(default_factory=time.monotonic, init=False)

    def run(self, plans: Sequence[TaskPlan]) -> None:
        """Collect every task that is not complete.

        Raises:
            Interrupted: a signal asked to stop; what was done is committed.
        """
        for plan in plans:
            self.writer.declare_task(plan.name, [sample.key for sample in plan.samples])
        self._check_gradients(plans)
        for plan in plans:
            self._run_task(plan)
        if self.stop.signal is not None:
            raise Interrupted(
                f"stopped by {signal.Signals(self.stop.signal).name} after the last batch: "
                f"{self.writer.path} is complete, there is nothing to resume",
                self.stop.signal,
            )

    def _run_task(self, plan: TaskPlan) -> None:
        committed = self.writer.committed_rows(plan.name)
        collectors, covered = self._collectors(plan)
        pending = [b for b in range(len(plan.batches)) if b not in covered]
        done = len(covered)
        self.progress.advance(plan.name, sum(len(plan.batches[b]) for b in covered), 0)
        # rows that were committed after the last snapshot are done again for the aggregates alone
        redo = [b for b in pending if committed.issuperset(plan.batches[b])]
        for b in redo:
            self._run_batch(plan, b, collectors, None, 0)
            done += 1
            self._stop_if_asked(plan, collectors, done)
        todo = [b for b in pending if b not in set(redo)]
        for group in self._segments(plan, todo):
            done += self._run_segment(plan, group, collectors)
            if self._snapshot_is_due() and done < len(plan.batches):
                self._snapshot(plan, collectors, done)
            self._stop_if_asked(plan, collectors, done)
        if pending:
            self._snapshot(plan, collectors, done)
        if missing := set(range(len(plan.samples))) - self.writer.committed_rows(plan.name):
            raise StoreError(
                f"{len(missing)} samples of task {plan.name!r} are not in {self.writer.path} after the last "
                f"batch ({plan.name}_{min(missing)} is the first): the store was begun with another plan of "
                "batches; collect into a new directory"
            )
        self.writer.complete(plan.name)

    def _collectors(self, plan: TaskPlan) -> tuple[list[Collector], set[int]]:
        """Collectors for a task, with the state of its last snapshot, and the batches which that covers."""
        # group values go last: extensions before them may fill their sinks in the shared pass
        collectors = [c for extension in self.extensions for c in extension.collectors(self.context)]
        collectors.append(GroupValues(self.context))
        snapshot = self.writer.load_snapshot(plan.name)
        if snapshot is None:
            return collectors, set()
        for collector in collectors:
            collector.load_state(snapshot.arrays)
        return collectors, set(snapshot.batches)

    def _segments(self, plan: TaskPlan, batches: Sequence[int]) -> Iterator[list[int]]:
        """Consecutive batches that are sealed together: about 64 MiB, or 16 batches."""
        group: list[int] = []
        size = 0
        for b in batches:
            group.append(b)
            size += self.row_bytes * len(plan.batches[b])
            if size >= _SEGMENT_BYTES or len(group) >= _SEGMENT_BATCHES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _lengths(self, plan: TaskPlan, rows: Sequence[int]) -> dict[str, list[int]]:
        """How many entries each sample has of what samples have differently many of."""
        samples = [plan.samples[row] for row in rows]
        lengths = {"ids": [len(s.input_ids) for s in samples], "labels": [len(s.labels) for s in samples]}
        if any(s.token_types is not None for s in plan.samples):
            lengths["types"] = [len(s.token_types or ()) for s in samples]
        if self.store_text:
            lengths["text"] = [len((s.text or "").encode()) for s in samples]
        return lengths

    def _run_segment(self, plan: TaskPlan, group: Sequence[int], collectors: Sequence[Collector]) -> int:
        """Run and commit some batches; fewer than asked when a signal arrives.

        Returns:
            Batches done.
        """
        rows = [row for b in group for row in plan.batches[b]]
        segment = self.writer.segment(plan.name, rows, ragged=self._lengths(plan, rows))
        start = done = 0
        try:
            for b in group:
                self._run_batch(plan, b, collectors, segment, start)
                start += len(plan.batches[b])
                done += 1
                if self.stop.signal is not None:
                    break
            segment.commit(start)
        except BaseException:
            segment.abort()
            raise
        return done

    def _run_batch(
        self,
        plan: TaskPlan,
        number: int,
        collectors: Sequence[Collector],
        segment: SegmentWriter | None,
        start: int,
    ) -> None:
        rows = plan.batches[number]
        batch = self._batch(plan, rows)
        losses = self.batch_pass.run(batch, collectors, segment, start)
        values = collectors[-1]
        if isinstance(values, GroupValues):
            groups = self.context.groups.groups
            check_rows(values.square, lambda g: groups[g].parameter, batch)
        if segment is not None:
            samples = [plan.samples[row] for row in rows]
            segment.put("sample/row", start, np.array(rows, dtype=np.int64))
            segment.put("sample/length", start, np.array([s.length for s in samples], dtype=np.int32))
            segment.put("sample/tokens", start, np.array([s.tokens for s in samples], dtype=np.int32))
            segment.put("sample/truncated", start, np.array([s.truncated for s in samples], dtype=np.int32))
            segment.put("sample/loss", start, losses.numpy())
            segment.put_ragged("ids/input", start, [np.array(s.input_ids, dtype=np.int32) for s in samples])
            segment.put_ragged("labels/ids", start, [np.array(s.labels, dtype=np.int32) for s in samples])
            if any(s.token_types is not None for s in plan.samples):
                types = [np.array(s.token_types or (), dtype=np.int32) for s in samples]
                segment.put_ragged("types/ids", start, types)
            if self.store_text:
                texts = [np.frombuffer((s.text or "").encode(), dtype=np.uint8) for s in samples]
                segment.put_ragged("text/bytes", start, texts)
        self.progress.advance(plan.name, len(rows), self.writer.bytes_written)

    def _batch(self, plan: TaskPlan, rows: Sequence[int]) -> Batch:
        return make_batch(
            plan.name,
            rows,
            plan.samples,
            pad_id=self.pad_id,
            side=self.pad_side,
            device=self.context.device,
        )

    def _snapshot_is_due(self) -> bool:
        """Snapshots may take a tenth of the run's time."""
        return time.monotonic() - self._snapshot_at >= self._snapshot_seconds / _SNAPSHOT_SHARE

    def _snapshot(self, plan: TaskPlan, collectors: Sequence[Collector], done: int) -> None:
        begun = time.monotonic()
        arrays = {}
        for collector in collectors:
            arrays.update(collector.state())
        batches = list(range(done))
        count = sum(len(plan.batches[b]) for b in batches)
        self.writer.snapshot(plan.name, batches, count, arrays)
        self._snapshot_at = time.monotonic()
        self._snapshot_seconds = self._snapshot_at - begun

    def _stop_if_asked(self, plan: TaskPlan, collectors: Sequence[Collector], done: int) -> None:
        if self.stop.signal is None or done == len(plan.batches):
            return
        self._snapshot(plan, collectors, done)
        name = signal.Signals(self.stop.signal).name
        raise Interrupted(
            f"stopped by {name}: {done} of {len(plan.batches)} batches of task {plan.name!r} are sealed in "
            f"{self.writer.path}. The same command resumes: {resume_command()}",
            self.stop.signal,
        )

    def _check_gradients(self, plans: Sequence[TaskPlan]) -> None:
        """Once: a sample has the gradient that autograd finds, and the same beside a longer one."""
        batches = [
            (plan, batch)
            for plan in plans
            for batch in plan.batches
            if not self.writer.committed_rows(plan.name)
        ]
        if not batches:
            return
        # padding is what couples samples most often: take the planned batch with the most of it
        plan, rows = max(batches, key=lambda b: (len(b[1]) > 1, _spread(*b)))
        sample = f"{plan.name}_{rows[0]}"
        groups = self.context.groups.groups
        values = GroupValues(self.context)
        single = self._batch(plan, rows[:1])
        self.batch_pass.run(single, [values])
        alone = values.square[0].double().cpu()
        reference = self.batch_pass.by_autograd(single)
        coarser = max(self.model_dtype, self.batch_pass.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        check_against_autograd(alone, reference, lambda g: groups[g].parameter, sample, coarser)
        if len(rows) > 1:
            self.batch_pass.run(self._batch(plan, (rows[0], rows[-1])), [values])
            check_independence(alone, values.square[0].double().cpu(), sample, self.model_dtype)


def _spread(plan: TaskPlan, batch: Sequence[int]) -> int:
    """Padding of the batch's shortest sample; batches are sorted by length."""
    return plan.samples[batch[-1]].length - plan.samples[batch[0]].length


def resume_command() -> str:
    """The command line of this process, as it can be typed again."""
    if not sys.argv or not sys.argv[0]:
        return "the same call"
    script = Path(sys.argv[0])
    # `python -m package` leaves the path of the package's __main__.py in its place
    head = ["python", "-m", script.parent.name] if script.name == "__main__.py" else [sys.argv[0]]
    return shlex.join([*head, *sys.argv[1:]])
