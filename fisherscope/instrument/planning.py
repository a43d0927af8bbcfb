"""What a run will do, settled before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fisherscope.instrument.batch import Batch, make_batch
from fisherscope.instrument.data import Sample
from fisherscope.instrument.estimate import Estimate, estimate_bytes
from fisherscope.instrument.extensions.base import Collector, Context
from fisherscope.instrument.guards import random_state
from fisherscope.instrument.header import make_header
from fisherscope.instrument.limits import (
    BatchLimits,
    Footprint,
    limits_of_store,
    plan_batches,
)
from fisherscope.instrument.memory import SavedBytes, usable
from fisherscope.instrument.model_facts import ModelFacts
from fisherscope.instrument.objectives import Objective, resolve_objective
from fisherscope.instrument.options import CollectOptions
from fisherscope.instrument.passes import BatchPass
from fisherscope.instrument.prepared import prepared
from fisherscope.instrument.targets import Targets
from fisherscope.instrument.tasks import Tasks, prepare_tasks
from fisherscope.layout import GroupTable, ModelLayout
from fisherscope.store import StoreHeader


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


@dataclass(frozen=True)
class RunPlan:
    """One collection: its data, its batches and who does the work.

    Attributes:
        options: of the collection.
        objective: the loss.
        tasks: samples and batches of each task.
        limits: of batches.
        budget: bytes of memory that it may take; None where the user set the size of batches.
        estimate: sizes.
        context: what collectors may know.
        batch_pass: runs a batch.
        pad_id, pad_side: how batches are padded.
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

    def collectors(self) -> list[Collector]:
        """Fresh collectors of all quantities for one task."""
        return [c for extension in self.options.resolved for c in extension.collectors(self.context)]


class Planner:
    """Plans runs of one model."""

    def __init__(self, facts: ModelFacts, layout: ModelLayout, targets: Targets) -> None:
        """Plan for this model, layout and choice of parameters."""
        self._facts = facts
        self._layout = layout
        self._targets = targets

    def plan(self, tasks: Tasks, options: CollectOptions, path: Path | None = None) -> RunPlan:
        """Read the tasks and settle the batches.

        Args:
            tasks: name -> rows.
            options: of the collection.
            path: of the store; one that is there already has its batches planned.

        Raises:
            DataError: a task or row cannot be used.
            ValueError: no such objective.
        """
        objective = resolve_objective(options.objective, self._facts.model)
        return self.plan_samples(
            prepare_tasks(tasks, self._facts, options, objective), options, objective, path
        )

    def plan_samples(
        self,
        samples: Mapping[str, Sequence[Sample]],
        options: CollectOptions,
        objective: Objective,
        path: Path | None = None,
    ) -> RunPlan:
        """The same for samples that are read already."""
        context = self._context(options)
        batch_pass = BatchPass(
            self._facts.model, self._targets, objective, context, options.torch_dtype, seed=options.seed
        )
        estimate = estimate_bytes(self._layout, self._targets.parameters, options, samples)
        side, pad = self._facts.pad_side(objective), self._facts.pad_id()
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
            footprint = self._footprint(batch_pass, one, longest.cost, estimate, options)
            planned = None if path is None else limits_of_store(path)
            limits = planned or footprint.limits(budget, longest.cost, context.device)
        plans = [
            TaskPlan(name, rows, plan_batches([s.cost for s in rows], limits))
            for name, rows in samples.items()
        ]
        if footprint is not None:
            largest = max(footprint.of_batch(len(b), p.samples[b[0]].cost) for p in plans for b in p.batches)
            estimate = replace(estimate, memory_bytes=largest)
        return RunPlan(options, objective, plans, limits, budget, estimate, context, batch_pass, pad, side)

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
        )

    def _footprint(
        self, batch_pass: BatchPass, batch: Batch, cost: int, estimate: Estimate, options: CollectOptions
    ) -> Footprint:
        saved = SavedBytes([*self._facts.model.parameters(), *self._facts.model.buffers()])
        seeded = random_state(options.seed, deterministic=options.deterministic)
        with seeded, prepared(self._facts.model), saved.counted():
            batch_pass.forward(batch)
        gradients = options.sample_gradients
        stored = gradients.chosen(self._layout, self._targets.parameters) if gradients else ()
        sizes = [self._facts.model.get_parameter(name).numel() for name in stored]
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
