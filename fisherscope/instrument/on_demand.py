"""Gradients and factors of chosen samples of a store, computed again with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherscope.errors import CoverageError, FingerprintError, NotStoredError
from fisherscope.instrument.capture import Capture, CaptureFactors, Factors
from fisherscope.instrument.checking.proving import Proofs
from fisherscope.instrument.checking.schedule import Schedule
from fisherscope.instrument.data import Labelling, Sample
from fisherscope.instrument.extensions.base import Collector
from fisherscope.instrument.fingerprint import weights_digest
from fisherscope.instrument.guards import random_state
from fisherscope.instrument.header import PARTS, state_of
from fisherscope.instrument.model_facts import ModelFacts
from fisherscope.instrument.objectives import Objective, resolve_objective
from fisherscope.instrument.options import CollectOptions
from fisherscope.instrument.patterns import matching, suggestion
from fisherscope.instrument.planning import Planner, RunPlan
from fisherscope.instrument.prepared import prepared
from fisherscope.instrument.tasks import Tasks, prepare_tasks
from fisherscope.layout import ModelLayout
from fisherscope.store import ContributionStore
from fisherscope.store.position_plan import side_of
from fisherscope.store.schema import differences


def check_same_run(store: ContributionStore, facts: ModelFacts, objective: Objective) -> None:
    """The model and the objective are those of the store.

    Raises:
        FingerprintError: one of them is another.
    """
    stored = store.header.fingerprint
    if stored.get("objective") != objective.name:
        raise FingerprintError(
            f"the gradients of {store.path} are those of the objective {stored.get('objective')!r}, and this "
            f"is {objective.name!r}: pass the same objective="
        )
    dtype = str(facts.dtype).removeprefix("torch.")
    if (before := stored.get("dtype", dtype)) != dtype:
        raise FingerprintError(
            f"{store.path} was collected from a model in {before}, and this one is in {dtype}: load it in "
            f"{before}"
        )
    if stored.get("weights") != weights_digest(facts.model):
        raise FingerprintError(f"{store.path} was collected from a model with other weights than this one")


def refuse_other_objective(store: ContributionStore, objective: Objective) -> None:
    """An objective of the user's own must refer to what that of the store did; it has run since it came.

    Raises:
        FingerprintError: it refers to something else.
    """
    stored = store.header.fingerprint.get(PARTS, {})
    before, now = ({f"{PARTS}.{k}": v for k, v in parts.items()} for parts in (stored, objective.parts))
    state = {*store.header.state, *(f"{PARTS}.{name}" for name in state_of(objective))}
    if changes := differences(before, now, state):
        raise FingerprintError(
            f"the gradients of {store.path} are those of another objective. It differs in\n  "
            + "\n  ".join(changes)
            + "\nPass the same objective="
        )


def check_model(
    store: ContributionStore,
    planner: Planner,
    objective: Objective,
    seed: int,
    given: Mapping[str, Sample],
) -> dict[str, Any] | None:
    """Have a model compute what a store knows its model by.

    Args:
        store: the store.
        planner: of the model.
        objective: of the store.
        seed: of the run.
        given: samples that are at hand, by key.

    Returns:
        What there is to note; None where the store has no such record.

    Raises:
        FingerprintError: the model computes something else.
    """
    if not store.evidence("probe"):
        return None
    dtype = store.header.options.get("compute_dtype", "float32")
    options = CollectOptions(extensions=(), compute_dtype=dtype, seed=seed)
    try:
        prober = planner.of_parameters(store.parameters).prober(options, objective)
    except CoverageError as error:
        raise FingerprintError(
            f"this model does not have the parameters that {store.path} was collected from ({error}): "
            "restore it as it was, or collect into another directory"
        ) from error
    seeded = random_state(seed, deterministic=bool(store.header.options.get("deterministic")))
    with seeded, prepared(planner.model):
        return prober.compare(store, given, lambda places: stored_samples(store, places, objective.labelling))


def parse_ids(store: ContributionStore, ids: Iterable[str]) -> list[tuple[str, int]]:
    """Task and row of sample ids such as "math_7".

    Raises:
        KeyError: there is no such sample.
    """
    if isinstance(ids, str):
        ids = (ids,)
    found = []
    for name in ids:
        if not isinstance(name, str):
            raise KeyError(
                f"{name!r} is no id of a sample: ids are texts such as '{store.tasks[0]}_3', of task and row"
            )
        task, _, row = name.rpartition("_")
        if task not in store.tasks or not row.isdecimal() or int(row) >= store.n(task):
            raise KeyError(
                f"{store.path} has no sample {name!r}: ids look like 'math_7', tasks are {store.tasks}"
            )
        found.append((task, int(row)))
    if not found:
        raise KeyError("no sample ids are given: they look like 'math_7'")
    return found


def stored_samples(
    store: ContributionStore, places: Sequence[tuple[str, int]], labelling: Labelling
) -> list[Sample]:
    """The samples as the model saw them, out of the store.

    Raises:
        NotStoredError: the store does not hold what the model saw, as of images.
    """
    keys = {task: store.samples(task).set_index("row")["key"] for task in {task for task, _ in places}}
    return [_stored_sample(store, task, row, labelling, keys[task][row]) for task, row in places]


def _stored_sample(store: ContributionStore, task: str, row: int, labelling: Labelling, key: str) -> Sample:
    ids, labels = store.token_ids(task, row)
    types = store.token_types(task, row)
    sample = Sample(
        tuple(ids.tolist()),
        tuple(labels.tolist()),
        labelling=labelling,
        token_types=None if types is None else tuple(types.tolist()),
    )
    # a sample that repeats another has another key
    for occurrence in range(row + 1):
        if (found := replace(sample, occurrence=occurrence)).key == key:
            return found
    raise NotStoredError(
        f"{store.path} does not hold what the model saw of {task}_{row}, as it does not hold images: pass "
        "the data again with tasks="
    )


def given_samples(
    store: ContributionStore, places: Sequence[tuple[str, int]], tasks: Mapping[str, Sequence[Sample]]
) -> list[Sample]:
    """The samples out of data that is given again.

    Raises:
        FingerprintError: it is not the data that the store was collected from.
    """
    found = []
    keys = {task: store.samples(task).set_index("row")["key"] for task in {task for task, _ in places}}
    for task, row in places:
        rows = tasks.get(task, ())
        if row >= len(rows) or rows[row].key != keys[task][row]:
            raise FingerprintError(f"tasks= does not hold {task}_{row} as {store.path} was collected from it")
        found.append(rows[row])
    return found


def chosen_parameters(instrumented: Sequence[str], patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Instrumented parameters that match; all of them for None.

    Raises:
        CoverageError: none does.
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    names = tuple(instrumented) if patterns is None else matching(instrumented, patterns)
    if not names:
        raise CoverageError(
            f"parameters={patterns!r} matches none of the instrumented parameters. "
            f"{suggestion(instrumented, patterns or ())}scope.parameters lists them"
        )
    return names


@dataclass(frozen=True)
class Rerun:
    """Chosen samples that go through the model once more.

    Attributes:
        planner: plans their batches.
        facts: of the model.
        samples: in the order in which they were asked for.
        objective: their loss.
        options: of the run.
    """

    planner: Planner
    facts: ModelFacts
    samples: Sequence[Sample]
    objective: Objective
    options: CollectOptions

    @cached_property
    def _plan(self) -> RunPlan:
        return self.planner.plan_samples({"chosen": self.samples}, self.options, self.objective)

    @property
    def weights(self) -> Mapping[str, int]:
        """The instrumented weights of linear maps, each with its axis over output features."""
        return self._plan.batch_pass.linear_maps.output_axes

    def prepare(self) -> None:
        """Plan the batches; the objective is run on a few samples."""
        _ = self._plan

    def run(self, collector: Collector) -> list[int]:
        """Feed a collector.

        Returns:
            The places of the samples, in the order in which they came.

        Raises:
            CoverageError: the gradients of the first batch are not what autograd finds.
        """
        order: list[int] = []
        plan = self._plan
        seeded = random_state(self.options.seed, deterministic=self.options.deterministic)
        with seeded, prepared(self.facts.model):
            task = plan.tasks[0]
            # the parameters may be others than those of the store, of which nothing was proved
            schedule = Schedule("first", len(task.batches), self.options.seed)
            proofs = Proofs(plan.batch_pass, self.objective, schedule, force=False)
            for number, rows in enumerate(task.batches):
                batch, samples = plan.batch(task, rows), [task.samples[row] for row in rows]
                proof = proofs.begin(task.name, number, samples, [collector])
                witnesses = () if proof is None else proof.witnesses
                losses = plan.batch_pass.run(batch, [collector], witnesses=witnesses)
                proofs.settle(proof, batch, samples, losses)
                order.extend(rows)
        return order


def rerun(
    store: ContributionStore,
    ids: Iterable[str],
    planner: Planner,
    facts: ModelFacts,
    tasks: Tasks | None,
    options: CollectOptions,
) -> Rerun:
    """Find chosen samples of a store, as this model saw them.

    Args:
        store: collected from this model.
        ids: of the samples.
        planner: plans the run.
        facts: of the model.
        tasks: the data, where the store does not hold it.
        options: of the run.

    Raises:
        FingerprintError: the store is that of another model, objective or data.
        KeyError: the store has no such sample.
        NotStoredError: the store does not hold the data.
    """
    objective = resolve_objective(options.objective, facts.model)
    check_same_run(store, facts, objective)
    places = parse_ids(store, ids)
    given: dict[str, Sample] = {}
    if tasks is None:
        samples = stored_samples(store, places, objective.labelling)
    else:
        stored = store.header.options
        as_collected = replace(options, max_length=stored["max_length"], seed=stored["seed"] or 0)
        every = prepare_tasks(tasks, facts, as_collected, objective)
        samples = given_samples(store, places, every)
        given = {sample.key: sample for rows in every.values() for sample in rows}
    check_model(store, planner, objective, int(store.header.options.get("seed") or 0), given)
    again = Rerun(planner, facts, samples, objective, options)
    again.prepare()
    refuse_other_objective(store, objective)
    return again


def gradients_again(again: Rerun, parameters: Sequence[str]) -> dict[str, Tensor]:
    """Gradients g_i of samples, in their order: per parameter ``[n, *shape]`` float32 on the CPU."""
    capture = Capture(parameters)
    back = torch.tensor(again.run(capture), dtype=torch.int64, device="cpu").argsort()
    return {name: gradients[back] for name, gradients in capture.stacked().items()}


def factors_again(again: Rerun, layout: ModelLayout, parameters: Sequence[str]) -> list[Factors]:
    """What made the gradients of samples, position by position: for each, in their order, by parameter.

    Raises:
        CoverageError: the gradient of one of the parameters is no sum over positions.
    """
    sides = {name: side_of(layout, name) for name in parameters}
    capture = CaptureFactors(sides, again.samples)
    again.run(capture)
    return [
        {name: capture.factors[name][place] for name in parameters} for place in range(len(again.samples))
    ]
