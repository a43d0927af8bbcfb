"""What a run will do, settled before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from fisherscope.errors import CoupledSamplesError
from fisherscope.instrument.batch import Batch, make_batch
from fisherscope.instrument.checking.probe import Prober
from fisherscope.instrument.checking.state import Repetition
from fisherscope.instrument.choosing_encodings import ChosenEncodings, choose_encodings
from fisherscope.instrument.data import Sample
from fisherscope.instrument.estimate import Estimate, estimate_bytes, mean_lengths
from fisherscope.instrument.extensions.base import Collector, Context
from fisherscope.instrument.guards import random_state
from fisherscope.instrument.header import make_header
from fisherscope.instrument.limits import (
    BatchLimits,
    Footprint,
    limits_of_store,
    plan_batches,
)
from fisherscope.instrument.memory import SavedBytes, is_out_of_memory, release, usable
from fisherscope.instrument.model_facts import ModelFacts
from fisherscope.instrument.objectives import Objective, resolve_objective
from fisherscope.instrument.options import CollectOptions
from fisherscope.instrument.passes import BatchPass
from fisherscope.instrument.prepared import prepared
from fisherscope.instrument.shared_inputs import Seen, look_at, two_short
from fisherscope.instrument.targets import Targets, select_targets
from fisherscope.instrument.tasks import Tasks, prepare_tasks
from fisherscope.layout import GroupTable, ModelLayout
from fisherscope.store import StoreHeader, StoreWriter


@dataclass(frozen=True)
class TaskPlan:
    """One task and its batches.

    Attributes:
        name: of the task.
        samples: in row order.
        batches: row numbers of each batch.
        gradient_rows: of so many rows, from the first, gradients are stored; no batch has both kinds.
    """

    name: str
    samples: Sequence[Sample]
    batches: Sequence[tuple[int, ...]]
    gradient_rows: int

    def stores_gradients(self, batch: int) -> bool:
        """Whether gradients of the samples of a batch are stored."""
        return self.batches[batch][0] < self.gradient_rows

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[Sample],
        limits: BatchLimits,
        gradient_rows: int | None,
        extents: Sequence[range] | None = None,
    ) -> TaskPlan:
        """Plan the batches of a task.

        Args:
            name: of the task.
            samples: in row order.
            limits: of a batch.
            gradient_rows: of so many rows gradients are stored; None for all.
            extents: rows that the task began with, and those that were added each time: what was planned
                before stays as it is.
        """
        costs, most = [s.cost for s in samples], len(samples) if gradient_rows is None else gradient_rows
        batches = [
            batch
            for rows in extents or [range(len(samples))]
            for part in (range(rows.start, min(rows.stop, most)), range(max(rows.start, most), rows.stop))
            for batch in plan_batches(costs, limits, part)
        ]
        return cls(name, samples, batches, most)


@dataclass(frozen=True)
class RunPlan:
    """One collection: its data, its batches and who does the work.

    Attributes:
        options: of the collection.
        objective: the loss.
        tasks: samples and batches of each task.
        limits: of what runs at once.
        budget: bytes of memory that it may take; None where the user set the size of batches.
        estimate: sizes.
        context: what collectors may know.
        batch_pass: runs a batch.
        pad_id, pad_side: how batches are padded.
        chosen: how gradients are kept.
    """

    options: CollectOptions
    objective: Objective
    tasks: Sequence[TaskPlan]
    limits: BatchLimits
    budget: int | None
    estimate: Estimate
    context: Context
    batch_pass: BatchPass
    pad_id: int
    pad_side: Literal["left", "right"]
    chosen: ChosenEncodings = field(default_factory=ChosenEncodings)

    def batch(self, task: TaskPlan, rows: Sequence[int]) -> Batch:
        """Some rows of a task, padded."""
        return make_batch(
            task.name,
            rows,
            task.samples,
            pad_id=self.pad_id,
            side=self.pad_side,
            device=self.context.device,
        )

    def settled(self, writer: StoreWriter) -> RunPlan:
        """The plan for the store that is there: its tasks are declared, and its rows and batches are kept.

        Raises:
            FingerprintError: a task of the store has samples that the run does not.
        """
        limits = limits_of_store(writer.header)
        tasks = []
        for task in self.tasks:
            declared = writer.declare_task(task.name, [sample.key for sample in task.samples])
            samples = [task.samples[place] for place in declared.order]
            tasks.append(TaskPlan.of(task.name, samples, limits, self._gradient_rows, declared.extents))
        chosen = replace(self.chosen, encodings=writer.header.encodings)
        limits = self.limits if self.options.sets_batches else limits
        return replace(self, tasks=tasks, limits=limits, chosen=chosen)

    def bytes_per_sample(self, *, gradients: bool) -> int:
        """What a sample takes in a segment with gradients or without."""
        mean = self.estimate.gradient_bytes_per_sample  # over all samples, also where few have gradients
        kept = sum(min(task.gradient_rows, len(task.samples)) for task in self.tasks)
        own = mean * sum(len(task.samples) for task in self.tasks) // max(kept, 1) if gradients else 0
        return self.estimate.bytes_per_sample - mean + own

    def share(self, task: TaskPlan) -> range:
        """Numbers of the batches that are this rank's."""
        return range(self.options.rank, len(task.batches), self.options.world_size)

    def share_rows(self, task: TaskPlan) -> int:
        """Number of samples in this rank's batches."""
        return sum(len(task.batches[b]) for b in self.share(task))

    @property
    def _gradient_rows(self) -> int | None:
        gradients = self.options.sample_gradients
        return None if gradients is None else gradients.max_samples

    def collectors(self) -> list[Collector]:
        """Fresh collectors of all quantities for one task."""
        found = [c for extension in self.options.resolved for c in extension.collectors(self.context)]
        for collector in found:
            collector.stored_as(self.chosen.encodings)
        return found


class Planner:
    """Plans runs of one model."""

    def __init__(self, facts: ModelFacts, layout: ModelLayout, targets: Targets) -> None:
        """Plan for this model, layout and choice of parameters."""
        self._facts = facts
        self._layout = layout
        self._targets = targets

    def plan(self, tasks: Tasks, options: CollectOptions, *, sizes_only: bool = False) -> RunPlan:
        """Read the tasks and plan the batches.

        Args:
            tasks: name -> rows.
            options: of the collection.
            sizes_only: no batch will be run, so that it does not matter whether the model repeats itself.

        Raises:
            CoupledSamplesError: the model does not repeat itself, and it was not forced.
            DataError: a task or row cannot be used.
            ValueError: no such objective.
        """
        objective = resolve_objective(options.objective, self._facts.model)
        samples = prepare_tasks(tasks, self._facts, options, objective)
        return self.plan_samples(samples, options, objective, sizes_only=sizes_only)

    def plan_samples(
        self,
        samples: Mapping[str, Sequence[Sample]],
        options: CollectOptions,
        objective: Objective,
        *,
        sizes_only: bool = False,
    ) -> RunPlan:
        """The same for samples that are read already.

        Raises:
            CoupledSamplesError: the model does not repeat itself, and it was not forced.
        """
        options = options.settled(self._layout, self._targets.parameters)
        context = self._context(options)
        batch_pass = BatchPass(
            self._facts.model, self._targets, objective, context, options.torch_dtype, seed=options.seed
        )
        side, pad = self._facts.pad_side(objective), self._facts.pad_id()
        # before any other pass: what is left behind by the longest sample shows in those that come later
        if not sizes_only:
            self._refuse_state(samples, options, objective, pad, side)
        chosen = self._encodings(batch_pass, samples, options, pad, side)
        estimate = estimate_bytes(
            self._layout,
            self._targets.parameters,
            options,
            samples,
            chosen.encodings,
            batch_pass.linear_maps.output_axes,
        )
        limits, budget, footprint = BatchLimits(1), None, None
        if isinstance(options.batch_size, int):
            limits = BatchLimits(options.batch_size)
        else:
            name, longest = max(
                ((name, sample) for name, rows in samples.items() for sample in rows),
                key=lambda s: s[1].cost,
            )
            one = make_batch(name, [0], [longest], pad_id=pad, side=side, device=context.device)
            budget = usable(context.device) if options.memory_budget is None else int(options.memory_budget)
            footprint = self._footprint(batch_pass, one, longest.cost, estimate, options, chosen)
            limits = footprint.limits(budget, longest.cost, context.device)
        gradients = options.sample_gradients
        most = None if gradients is None else gradients.max_samples
        plans = [TaskPlan.of(name, rows, limits, most) for name, rows in samples.items()]
        if footprint is not None:
            largest = max(footprint.of_batch(len(b), p.samples[b[0]].cost) for p in plans for b in p.batches)
            estimate = replace(estimate, memory_bytes=largest)
        return RunPlan(
            options, objective, plans, limits, budget, estimate, context, batch_pass, pad, side, chosen
        )

    def _refuse_state(
        self,
        tasks: Mapping[str, Sequence[Sample]],
        options: CollectOptions,
        objective: Objective,
        pad: int,
        side: Literal["left", "right"],
    ) -> None:
        """Refuse a model that gives the same sample something else another time.

        Raises:
            CoupledSamplesError: it does, and it was not forced.
        """
        named = {f"{task}_{row}": sample for task, rows in tasks.items() for row, sample in enumerate(rows)}

        def make(sample: Sample) -> Batch:
            return make_batch("run", [0], [sample], pad_id=pad, side=side, device=self._facts.device)

        seeded = random_state(options.seed, deterministic=options.deterministic)
        try:
            with seeded, prepared(self._facts.model, forward_only=True):
                parameters = self._context(options).parameters
                found = Repetition(self._facts.model, parameters, objective, make).find_state(named)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            release(self._facts.device)  # the run will say which sample is too large
            return
        if found is not None:
            if not options.force:
                raise CoupledSamplesError(found)
            warnings.warn(f"going on by force: {found}", stacklevel=2)

    @property
    def model(self) -> nn.Module:
        """The model that is planned for."""
        return self._facts.model

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the instrumented parameters."""
        return self._targets.parameters

    def of_parameters(self, names: Sequence[str]) -> Planner:
        """The same model with other parameters instrumented.

        Raises:
            CoverageError: the model has none of them.
        """
        if tuple(names) == self.parameters:
            return self
        return Planner(
            self._facts, self._layout, select_targets(self._facts.model, self._layout, list(names))
        )

    def prober(self, options: CollectOptions, objective: Objective) -> Prober:
        """What runs single samples of a store through the model."""
        context = self._context(options)
        model, side, pad = self._facts.model, self._facts.pad_side(objective), self._facts.pad_id()
        batch_pass = BatchPass(
            model, self._targets, objective, context, options.torch_dtype, seed=options.seed
        )

        def make(samples: Sequence[Sample]) -> Batch:
            rows = range(len(samples))
            return make_batch("probe", rows, samples, pad_id=pad, side=side, device=context.device)

        return Prober(self._facts, batch_pass, context, make)

    def header(self, plan: RunPlan) -> StoreHeader:
        """Of the run's store; hashes the weights."""
        return make_header(
            self._facts.model,
            self._facts.tokenizer,
            self._layout,
            self._targets.parameters,
            plan.options,
            objective=plan.objective,
            pad_side=plan.pad_side,
            limits=plan.limits,
            device=self._facts.device,
            dtype=self._facts.dtype,
            chosen=plan.chosen,
        )

    def _encodings(
        self,
        batch_pass: BatchPass,
        tasks: Mapping[str, Sequence[Sample]],
        options: CollectOptions,
        pad: int,
        side: Literal["left", "right"],
    ) -> ChosenEncodings:
        def look(names: Sequence[str]) -> Seen | None:
            task, rows = two_short(tasks)
            batch = make_batch(task, rows, tasks[task], pad_id=pad, side=side, device=self._facts.device)
            samples = [tasks[task][row] for row in rows]
            with (
                random_state(options.seed, deterministic=options.deterministic),
                prepared(self._facts.model),
            ):
                return look_at(batch_pass, self._layout, batch, samples, names)

        return choose_encodings(
            options.sample_gradients,
            self._layout,
            self._targets.parameters,
            batch_pass.linear_maps.output_axes,
            mean_lengths(tasks),
            look,
        )

    def _footprint(
        self,
        batch_pass: BatchPass,
        batch: Batch,
        cost: int,
        estimate: Estimate,
        options: CollectOptions,
        chosen: ChosenEncodings,
    ) -> Footprint:
        saved = SavedBytes([*self._facts.model.parameters(), *self._facts.model.buffers()])
        seeded = random_state(options.seed, deterministic=options.deterministic)
        with seeded, prepared(self._facts.model), saved.counted():
            batch_pass.forward(batch)
        gradients = options.sample_gradients
        stored = gradients.chosen(self._layout, self._targets.parameters) if gradients else ()
        # the factors of all others are there anyway
        formed = [name for name in stored if chosen.encodings.encoding(name) == "dense"]
        sizes = [self._facts.model.get_parameter(name).numel() for name in formed]
        return Footprint.of(saved.total, cost, max(sizes, default=0), estimate.accumulator_bytes)

    def _context(self, options: CollectOptions) -> Context:
        by_name = dict(self._facts.model.named_parameters())
        names, fisher = self._targets.parameters, options.fisher
        return Context(
            layout=self._layout,
            parameters={name: by_name[name] for name in names},
            groups=GroupTable.build(self._layout, names),
            normalization="per_token" if fisher is None else fisher.normalization,
            device=self._facts.device,
        )
