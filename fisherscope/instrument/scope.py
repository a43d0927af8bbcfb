"""The wrapped model: what can be collected from it, and collecting it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from fisherscope.adapters import resolve
from fisherscope.adapters.unwrap import unwrap, unwrap_pipeline
from fisherscope.instrument.at_work import at_work, ready_to_run
from fisherscope.instrument.capture import Factors
from fisherscope.instrument.checking.schedule import Check
from fisherscope.instrument.collection import SEALED_AHEAD, Collection
from fisherscope.instrument.estimate import Estimate
from fisherscope.instrument.extensions import Extension
from fisherscope.instrument.guards import (
    directory_at_hand,
    nothing_half_written,
    random_state,
    refuse_changed_gradients,
    refuse_if_disk_is_small,
)
from fisherscope.instrument.model_facts import ModelFacts
from fisherscope.instrument.objectives import Objective, Predict
from fisherscope.instrument.on_demand import (
    Rerun,
    check_model,
    chosen_parameters,
    factors_again,
    gradients_again,
    rerun,
)
from fisherscope.instrument.options import BatchSize, CollectOptions, ComputeDtype, Durability
from fisherscope.instrument.planning import Planner, RunPlan
from fisherscope.instrument.prepared import prepared
from fisherscope.instrument.progress import progress
from fisherscope.instrument.signals import stop_on_signals
from fisherscope.instrument.squares import Sinks, measure
from fisherscope.instrument.targets import ParameterChoice, select_targets
from fisherscope.instrument.tasks import Tasks
from fisherscope.instrument.token_strings import texts_of_tokens
from fisherscope.instrument.trial_run import try_run
from fisherscope.instrument.unchanged import Structure
from fisherscope.layout import GroupTable, ModelLayout, Partition
from fisherscope.linalg import Dense
from fisherscope.store import ContributionStore, StoreWriter, as_store, open_store
from fisherscope.store.lifecycle import store_path
from fisherscope.telling import say, steps
from fisherscope.words import counted

if TYPE_CHECKING:
    from fisherscope.adapters.registry import Adapter, Verify


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    parameters: ParameterChoice = "linear",
    adapter: Adapter | str | None = None,
    verify: Verify = "first",
    strict: bool = False,
) -> Scope:
    """Instrument a HuggingFace model. Nothing in the model changes.

    Args:
        model: a transformers model, for instance from ``AutoModelForCausalLM.from_pretrained``, or what holds
            one: a compiled model, ``DistributedDataParallel``, a PEFT model, a ``transformers`` pipeline.
        tokenizer: its tokenizer; needed for tasks of text only. A pipeline brings its own.
        parameters: "attention" (Q, K, V, O), "linear" (all linear maps of the layers, with biases),
            "all", or a list of shell-style patterns of parameter names. Of a PEFT model "attention" and
            "linear" are what its adapters train there; "all" takes the model's own weights, too.
        adapter: where the heads are, in place of what is registered for the model type: a function as for
            :func:`fisherscope.register_adapter`, or the model type whose adapter to use.
        verify: check the layout of heads numerically on the "first" layer of each kind, on "all", or not at
            all (False). What is detected in a model type that nobody registered is always checked.
        strict: refuse a model whose heads cannot be confirmed; otherwise a warning says what is missing, and
            modules and their rows are there.

    Returns:
        A :class:`Scope`. Its ``model`` is the transformers model, out of whatever was around it; adapters of
        PEFT stay in it, and parameters have the names that they have there.

    Raises:
        AdapterError: this is not a transformers model, or it is sharded, offloaded or quantised; its layout
            is not what the adapter says; or ``strict``, and heads could not be confirmed.
        CoverageError: ``parameters`` matches nothing that can be instrumented.
    """
    model, tokenizer = unwrap_pipeline(model, tokenizer)
    model = unwrap(model)
    with ready_to_run(model):
        layout = resolve(model, adapter=adapter, verify=verify, strict=strict)
        return Scope(model, tokenizer, layout, parameters)


class Scope:
    """A model with its layout and the choice of instrumented parameters.

    Attributes:
        model: the transformers model, untouched, out of whatever was around it.
        tokenizer: its tokenizer or None.
        layout: where each head lives.
        parameters: names of the instrumented parameters.
        structure: what the model was made of when it was wrapped.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, layout: ModelLayout, parameters: ParameterChoice
    ) -> None:
        """Use :func:`wrap`."""
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self._targets = select_targets(model, layout, parameters)
        self.parameters = self._targets.parameters
        self.structure = Structure.of(model)
        self._facts = ModelFacts(model, tokenizer)
        self._planner = Planner(self._facts, layout, self._targets)

    def __repr__(self) -> str:
        heads = {(a.n_heads, a.n_kv_heads) for a in self.layout.attention}
        return (
            f"Scope({type(self.model).__name__}, {counted(len(self.layout.attention), 'attention layer')}, "
            f"{self.layout.source}, "
            f"heads (query, kv) {sorted(heads)}, {counted(len(self.parameters), 'parameter')} instrumented)"
        )

    def coverage(self) -> pd.DataFrame:
        """What is instrumented and why the rest is not.

        Returns:
            One row per parameter: parameter, shape, size, kind, layer (-1 outside the layers), module, runs
            (of the module in a forward pass, as far as was seen: of a shared layer several), selected,
            covered, reason.
        """
        coverage = self._targets.coverage.copy()
        runs = [self.layout.runs(name) for name in coverage["parameter"]]
        coverage.insert(list(coverage.columns).index("module") + 1, "runs", runs)
        return coverage

    @at_work
    def estimate(
        self,
        tasks: Tasks,
        *,
        extensions: Sequence[str | Extension] = ("fisher", "sample_gradients"),
        measure: bool = True,
        directory: str | Path | None = None,
        **options: Any,
    ) -> Estimate:
        """Time, memory and disk that a collection would take.

        Args:
            tasks: as for :meth:`collect`.
            extensions: as for :meth:`collect`.
            measure: run a few of the batches, the largest among them, for the time and the memory. Without
                it there are sizes alone, and for ``batch_size="auto"`` the memory by a forward pass of the
                longest sample.
            directory: on the disk that the store will be on; by default where temporary files go. What the
                trial writes there is removed.
            **options: other options of :meth:`collect`; ``quiet`` says nothing of what is done.

        Returns:
            An :class:`~fisherscope.instrument.estimate.Estimate`; print it.
        """
        begun = time.perf_counter()
        asked = CollectOptions(extensions=extensions, **options)
        with steps("estimate:", 3 if measure else 1, quiet=asked.quiet, announce=True) as told:
            with told.step("reading the tasks and planning batches"):
                plan = self._planner.plan(tasks, asked, sizes_only=not measure)
            if not measure:
                return plan.estimate
            with told.step("hashing the weights of the model"):
                header, constants = self._planner.header(plan), self._constants(plan)
            prepared_in = time.perf_counter() - begun
            where = None if directory is None else directory_at_hand(directory)
            batches = sum(len(task.batches) for task in plan.tasks)
            with told.step(f"running some of {counted(batches, 'batch', 'batches')}, the largest among them"):
                trial = try_run(plan, header, constants, where)
        memory = plan.estimate.memory_bytes if trial.memory_bytes is None else trial.memory_bytes
        return replace(plan.estimate, seconds=prepared_in + trial.seconds, memory_bytes=memory)

    @at_work
    def collect(
        self,
        tasks: Tasks,
        out: str | Path,
        *,
        extensions: Sequence[str | Extension] = ("fisher", "sample_gradients"),
        objective: str | Objective | Predict = "auto",
        max_length: int | None = None,
        max_samples: int | None = None,
        batch_size: BatchSize = "auto",
        compute_dtype: ComputeDtype = "float32",
        memory_budget: int | str | None = None,
        store_text: bool = True,
        durability: Durability = "power",
        deterministic: bool = False,
        resume: bool = True,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        force: bool = False,
        check: Check = "auto",
        quiet: bool = False,
    ) -> ContributionStore:
        """Collect the tasks into a store, batch by batch, from one backward pass each.

        The model is left as it was: modes, ``requires_grad``, ``.grad``, hooks and random state. A run that
        was stopped or killed goes on where it was when the same call is made again. A store that is there
        takes further tasks, and tasks with more samples than before, in any order: samples are known by what
        they are, and keep their rows.

        Args:
            tasks: name -> rows. A row is a string, a dict (``{"text"}``, ``{"prompt", "completion"}``,
                ``{"messages"}``, ``{"input_ids", "labels"}``) or token ids; for classification a ``label``
                goes with ``text`` or ``input_ids`` (or ``pixel_values``), for encoder-decoders a ``target``.
                Rows may come as a list, a ``datasets.Dataset``, a DataLoader of batches, or the path of a
                JSONL file.
            out: directory of the store, such as "run.fs".
            extensions: quantities to collect, names or objects such as ``Fisher(shape="groups")``.
                Group values per sample are always collected.
            objective: "auto" (what the model's head is for), "causal_lm", "masked_lm", "seq2seq",
                "sequence_classification", "token_classification", "image_classification", or a function
                ``loss(model, batch) -> [n]`` of summed losses (or of :class:`fisherscope.Predictions`).
            max_length: longer rows are cut on the right, and counted.
            max_samples: take the first so many rows of each task.
            batch_size: samples per batch, or "auto": as many as fit the memory, up to where more are not
                faster. Should memory run out all the same, batches are halved and the run goes on. Results
                do not depend on it beyond rounding.
            compute_dtype: dtype in which layer inputs and output gradients are multiplied.
            memory_budget: bytes, or a text such as "8GB", that "auto" may take beside the model, accumulators
                included; by default half of what is free on a CPU and 80 % of a GPU.
            store_text: keep the samples' texts, and how their tokens read, in the store, for reports.
            durability: "power" survives power loss, "process" survives kill -9, "none" promises nothing.
            deterministic: use deterministic algorithms only.
            resume: False refuses to continue an existing store; ranks have to join one, and leave it True.
            rank: which of ``world_size`` processes this is; each makes the same call with its own rank, and
                takes its share of the batches.
            world_size: how many processes collect into this store at once.
            seed: of sampled labels, of masks, and of the random state that objectives see.
            force: go on, with a warning, where samples influence each other, within a batch or from one pass
                to the next; what is stored is then the gradient of something else than single samples.
            check: which batches are proved by an ordinary backward pass of randomly weighted losses. "auto":
                the first, the first of each structure and a share of the others that costs about 2 % of a
                long run; "every"; "first"; or "off".
            quiet: no progress.

        Returns:
            The store, opened for reading.

        Raises:
            DataError: a task or row cannot be used; nothing has been written.
            NonFiniteError: a weight, loss or gradient is NaN or infinite.
            CoupledSamplesError: samples influence each other within a batch, and not ``force``.
            CoverageError: the hooks do not see what autograd finds, or hooks on parameters change gradients.
            StoreError: the directory holds something else, or the disk is too small.
            ModelBusyError: another call is collecting from the same model.
            ModelChangedError: modules or parameters of the model are others than when it was wrapped.
            Interrupted: stopped by Ctrl-C or SIGTERM; what was done is sealed.
        """
        options = CollectOptions(
            extensions=extensions,
            objective=objective,
            max_length=max_length,
            max_samples=max_samples,
            batch_size=batch_size,
            memory_budget=memory_budget,
            compute_dtype=compute_dtype,
            store_text=store_text,
            durability=durability,
            deterministic=deterministic,
            resume=resume,
            rank=rank,
            world_size=world_size,
            seed=seed,
            force=force,
            check=check,
            quiet=quiet,
        )
        refuse_changed_gradients(self.model)
        path = store_path(out)
        plan = self._planner.plan(tasks, options)
        header = self._planner.header(plan)
        refuse_if_disk_is_small(plan.estimate, path)
        with ExitStack() as stack:
            writer = stack.enter_context(
                StoreWriter.open(
                    path,
                    header,
                    rank=rank,
                    durability=options.durability,
                    resume=options.resume,
                    world_size=world_size,
                    queue=SEALED_AHEAD,
                )
            )
            stack.enter_context(nothing_half_written(writer))
            # before anything is declared: a run that is refused leaves the store as it was
            self._check_model(plan, writer)
            plan = plan.settled(writer)
            if options.store_text:
                writer.token_texts(texts_of_tokens(self.tokenizer, plan))
            stop = stack.enter_context(stop_on_signals())
            stack.enter_context(random_state(options.seed, deterministic=options.deterministic))
            stack.enter_context(prepared(self.model))
            if not options.quiet:
                say(f"collect: {plan.estimate}; {plan.limits}\n")
            count = sum(plan.share_rows(task) for task in plan.tasks)
            bar = stack.enter_context(progress(count, quiet=options.quiet))
            prober = self._planner.prober(options, plan.objective)
            Collection(plan, writer, stop, bar, self._constants(plan), prober).run()
        return open_store(path)

    @at_work
    def gradients(
        self,
        store: ContributionStore | str | Path,
        ids: Sequence[str],
        *,
        parameters: Sequence[str] | None = None,
        tasks: Tasks | None = None,
        objective: str | Objective | Predict = "auto",
        compute_dtype: ComputeDtype = "float32",
        memory_budget: int | str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute gradients of chosen samples of a store again, with this model.

        They equal what a collection of these parameters stores in float32, up to rounding, so a store of
        group values can do without gradients of every sample.

        Args:
            store: a store that was collected from this model, or its path.
            ids: samples, such as ``["math_7", "code_23"]``.
            parameters: name patterns; by default all that are instrumented.
            tasks: the data, where the store does not hold it, as of images.
            objective: that of the collection, where it was a function of your own.
            compute_dtype: as for :meth:`collect`.
            memory_budget: as for :meth:`collect`.

        Returns:
            Per parameter ``[len(ids), *shape]``, float32 on the CPU, in the order of ``ids``.

        Raises:
            FingerprintError: the store is that of another model, objective or data.
            KeyError: the store has no such sample.
            NotStoredError: the store does not hold the data.
        """
        options = CollectOptions(
            extensions=(), objective=objective, compute_dtype=compute_dtype, memory_budget=memory_budget
        )
        again = self._rerun(store, ids, tasks, options)
        return gradients_again(again, chosen_parameters(self.parameters, parameters))

    @at_work
    def factors(
        self,
        store: ContributionStore | str | Path,
        ids: Sequence[str],
        *,
        parameters: Sequence[str] | None = None,
        tasks: Tasks | None = None,
        objective: str | Objective | Predict = "auto",
        compute_dtype: ComputeDtype = "float32",
        memory_budget: int | str | None = None,
    ) -> dict[str, Factors]:
        """Compute again, with this model, what made the gradients of chosen samples, position by position.

        The gradient of the weight of a linear map is ``g = sum_t d_t a_t'``, where a_t is what the map was
        given at position t and d_t the gradient of what it gave. A collection with
        ``SampleGradients(encoding="factored")`` stores the same, up to rounding.

        Args:
            store: a store that was collected from this model, or its path.
            ids: samples, such as ``["math_7", "code_23"]``.
            parameters: name patterns; by default all instrumented weights of linear maps.
            tasks: the data, where the store does not hold it, as of images.
            objective: that of the collection, where it was a function of your own.
            compute_dtype: as for :meth:`collect`.
            memory_budget: as for :meth:`collect`.

        Returns:
            Per sample id and parameter ``(a [T, in], d [T, out])``, float32 on the CPU, without padding; T
            are the sample's attended positions or, in a decoder beside an encoder, those of its labels.

        Raises:
            CoverageError: the gradient of a parameter is no sum over positions.
            FingerprintError: the store is that of another model, objective or data.
            KeyError: the store has no such sample.
            NotStoredError: the store does not hold the data.
        """
        options = CollectOptions(
            extensions=(), objective=objective, compute_dtype=compute_dtype, memory_budget=memory_budget
        )
        ids = list(dict.fromkeys((ids,) if isinstance(ids, str) else ids))
        again = self._rerun(store, ids, tasks, options)
        known = [n for n in self.parameters if parameters is not None or n in again.weights]
        found = factors_again(again, self.layout, chosen_parameters(known, parameters))
        return dict(zip(ids, found, strict=True))

    def _check_model(self, plan: RunPlan, writer: StoreWriter) -> None:
        """Have the model compute what a store that is there knows its model by.

        Raises:
            FingerprintError: it computes something else.
        """
        if not writer.has_constants:
            return
        given = {sample.key: sample for task in plan.tasks for sample in task.samples}
        found = check_model(open_store(writer.path), self._planner, plan.objective, plan.options.seed, given)
        if found is not None and (not found["compared"] or "environment" in found):
            writer.evidence("compared", found)

    def _rerun(
        self,
        store: ContributionStore | str | Path,
        ids: Sequence[str],
        tasks: Tasks | None,
        options: CollectOptions,
    ) -> Rerun:
        return rerun(as_store(store), ids, self._planner, self._facts, tasks, options)

    def _constants(self, plan: RunPlan) -> dict[str, torch.Tensor]:
        return {"groups/theta_square": self._theta_square(plan.context.groups)}

    def _theta_square(self, groups: GroupTable) -> torch.Tensor:
        """``sum theta ** 2`` of each group, float64."""
        out = torch.zeros(len(groups), dtype=torch.float64, device="cpu")
        by_name = dict(self.model.named_parameters())
        for name, members in groups.members.items():
            partitions: list[Partition | None] = [member.partition for member in members]
            theta = Dense(by_name[name].detach().unsqueeze(0))
            one = torch.ones(1, dtype=torch.float32, device=theta.device)
            found = measure(theta, one, partitions, Sinks())
            for member, values in zip(members, found.pieces, strict=True):
                out[member.first : member.first + values.shape[1]] += values[0].cpu()
        return out
