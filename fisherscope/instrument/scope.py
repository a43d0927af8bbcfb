"""The wrapped model: what can be collected from it, and collecting it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import nn

from fisherscope.adapters import resolve
from fisherscope.adapters.injected import plain_layer
from fisherscope.adapters.unwrap import unwrap, unwrap_pipeline
from fisherscope.errors import DataError
from fisherscope.instrument.batch import plan_batches
from fisherscope.instrument.collection import Collection, TaskPlan
from fisherscope.instrument.data import Sample, prepare_task, read_jsonl
from fisherscope.instrument.estimate import Estimate, estimate_bytes
from fisherscope.instrument.extensions import Extension
from fisherscope.instrument.extensions.base import Context
from fisherscope.instrument.guards import nothing_half_written, random_state, refuse_if_disk_is_small
from fisherscope.instrument.header import make_header
from fisherscope.instrument.objectives import Objective, Predict, resolve_objective
from fisherscope.instrument.options import CollectOptions, ComputeDtype, Durability
from fisherscope.instrument.passes import BatchPass
from fisherscope.instrument.prepared import prepared
from fisherscope.instrument.progress import progress
from fisherscope.instrument.signals import stop_on_signals
from fisherscope.instrument.targets import ParameterChoice, select_targets
from fisherscope.layout import GroupTable, ModelLayout, Partition
from fisherscope.linalg import Dense
from fisherscope.store import ContributionStore, StoreHeader, StoreWriter, open_store

if TYPE_CHECKING:
    from fisherscope.adapters.registry import Adapter, Verify
    from fisherscope.instrument.batch import BatchSize

Tasks = Mapping[str, Iterable[Any] | str | Path]

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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
            "all", or a list of shell-style patterns of parameter names.
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
    layout = resolve(model, adapter=adapter, verify=verify, strict=strict)
    return Scope(model, tokenizer, layout, parameters)


class Scope:
    """A model with its layout and the choice of instrumented parameters.

    Attributes:
        model: the transformers model, untouched, out of whatever was around it.
        tokenizer: its tokenizer or None.
        layout: where each head lives.
        parameters: names of the instrumented parameters.
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

    def __repr__(self) -> str:
        heads = {(a.n_heads, a.n_kv_heads) for a in self.layout.attention}
        return (
            f"Scope({type(self.model).__name__}, {len(self.layout.attention)} attention layers, "
            f"{self.layout.source}, "
            f"heads (query, kv) {sorted(heads)}, {len(self.parameters)} parameters instrumented)"
        )

    def coverage(self) -> pd.DataFrame:
        """What is instrumented and why the rest is not.

        Returns:
            One row per parameter: parameter, shape, size, kind, layer, module, selected, covered, reason.
        """
        return self._targets.coverage.copy()

    def estimate(
        self,
        tasks: Tasks,
        *,
        extensions: Sequence[str | Extension] = ("fisher", "sample_gradients"),
        **options: Any,
    ) -> Estimate:
        """Bytes on disk and in accumulators that a collection would take; nothing is run or written.

        Args:
            tasks: as for :meth:`collect`.
            extensions: as for :meth:`collect`.
            **options: other options of :meth:`collect` that change sizes (``max_samples``, ``max_length``).
        """
        chosen = CollectOptions(extensions=extensions, **options)
        objective = resolve_objective(chosen.objective, self.model)
        return self._estimate(self._prepare(tasks, chosen, objective), chosen)

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
        store_text: bool = True,
        durability: Durability = "power",
        deterministic: bool = False,
        resume: bool = True,
        seed: int = 0,
        quiet: bool = False,
    ) -> ContributionStore:
        """Collect the tasks into a store, batch by batch, from one backward pass each.

        The model is left as it was: modes, ``requires_grad``, ``.grad``, hooks and random state. A run that
        was stopped or killed goes on where it was when the same call is made again.

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
            batch_size: samples per batch, or "auto": a fixed budget of padded positions.
            compute_dtype: dtype in which layer inputs and output gradients are multiplied.
            store_text: keep the samples' texts in the store, for reports.
            durability: "power" survives power loss, "process" survives kill -9, "none" promises nothing.
            deterministic: use deterministic algorithms only.
            resume: False refuses to continue an existing store.
            seed: of sampled labels, of masks, and of the random state that objectives see.
            quiet: no progress.

        Returns:
            The store, opened for reading.

        Raises:
            DataError: a task or row cannot be used; nothing has been written.
            NonFiniteError: a weight, loss or gradient is NaN or infinite.
            CoupledSamplesError: samples influence each other within a batch.
            StoreError: the directory holds something else, or the disk is too small.
            Interrupted: stopped by Ctrl-C or SIGTERM; what was done is sealed.
        """
        options = CollectOptions(
            extensions=extensions,
            objective=objective,
            max_length=max_length,
            max_samples=max_samples,
            batch_size=batch_size,
            compute_dtype=compute_dtype,
            store_text=store_text,
            durability=durability,
            deterministic=deterministic,
            resume=resume,
            seed=seed,
            quiet=quiet,
        )
        path = Path(out)
        chosen = resolve_objective(options.objective, self.model)
        samples = self._prepare(tasks, options, chosen)
        plans = self._plan(samples, options)
        side = self._pad_side(chosen)
        header = self._header(options, chosen, side)
        estimate = self._estimate(samples, options)
        refuse_if_disk_is_small(estimate, path)
        with nothing_half_written(path), ExitStack() as stack:
            writer = stack.enter_context(
                StoreWriter.open(path, header, durability=options.durability, resume=options.resume)
            )
            stop = stack.enter_context(stop_on_signals())
            stack.enter_context(random_state(options.seed, deterministic=options.deterministic))
            stack.enter_context(prepared(self.model))
            if not options.quiet:
                sys.stderr.write(f"collect: {estimate}\n")
            bar = stack.enter_context(progress(sum(map(len, samples.values())), quiet=options.quiet))
            context = self._context(options, header)
            writer.constants({"groups/theta_square": self._theta_square(context.groups)})
            Collection(
                batch_pass=BatchPass(
                    self.model, self._targets, chosen, context, options.torch_dtype, seed=options.seed
                ),
                context=context,
                extensions=options.resolved,
                writer=writer,
                pad_id=self._pad_id(),
                pad_side=side,
                store_text=options.store_text,
                row_bytes=estimate.bytes_per_sample,
                stop=stop,
                progress=bar,
                model_dtype=self._device_and_dtype()[1],
            ).run(plans)
        return open_store(path)

    def _prepare(
        self, tasks: Tasks, options: CollectOptions, objective: Objective
    ) -> dict[str, list[Sample]]:
        """Every sample of every task, checked before anything is written."""
        if not isinstance(tasks, Mapping) or not tasks:
            raise DataError('no tasks: pass a mapping from name to rows, such as {"math": rows}')
        config: Any = self.model.config
        vocabulary = getattr(self._token_embeddings(), "num_embeddings", None)
        prepared_tasks = {}
        for name, rows in tasks.items():
            if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
                raise DataError(
                    f"{name!r} is not a task name: use letters, digits, '_', '.' and '-', at most 64 of them"
                )
            source = read_jsonl(rows) if isinstance(rows, str | Path) else rows
            prepared_tasks[name] = prepare_task(
                name,
                source,
                self.tokenizer,
                encode=objective.encode,
                labelling=objective.labelling,
                config=config,
                seed=options.seed,
                max_length=options.max_length,
                max_samples=options.max_samples,
                vocab_size=vocabulary,
                classes=config.num_labels if objective.label_range == "classes" else None,
                max_positions=self._max_positions(),
            )
            if len(prepared_tasks[name]) == 1:
                warnings.warn(
                    f"task {name!r} has a single sample: its variance, intervals and tests are undefined",
                    stacklevel=4,
                )
        return prepared_tasks

    def _plan(self, samples: Mapping[str, Sequence[Sample]], options: CollectOptions) -> list[TaskPlan]:
        device, _ = self._device_and_dtype()
        return [
            TaskPlan(name, rows, plan_batches([s.length for s in rows], options.batch_size, device))
            for name, rows in samples.items()
        ]

    def _context(self, options: CollectOptions, header: StoreHeader) -> Context:
        by_name = dict(self.model.named_parameters())
        fisher = options.fisher
        return Context(
            layout=self.layout,
            parameters={name: by_name[name] for name in self.parameters},
            groups=GroupTable.build(self.layout, header.parameters),
            normalization="per_token" if fisher is None else fisher.normalization,
            device=self._device_and_dtype()[0],
        )

    def _header(
        self, options: CollectOptions, objective: Objective, side: Literal["left", "right"]
    ) -> StoreHeader:
        device, dtype = self._device_and_dtype()
        return make_header(
            self.model,
            self.tokenizer,
            self.layout,
            self.parameters,
            options,
            objective=objective.name,
            pad_side=side,
            device=device,
            dtype=dtype,
        )

    def _estimate(self, samples: Mapping[str, Sequence[Sample]], options: CollectOptions) -> Estimate:
        gradients = options.sample_gradients
        fisher = options.fisher
        return estimate_bytes(
            self.layout,
            self.parameters,
            gradients.chosen(self.layout, self.parameters) if gradients else (),
            gradient_dtype=gradients.dtype if gradients else "bfloat16",
            full_fisher=fisher is not None and fisher.shape == "full",
            samples=samples,
            store_text=options.store_text,
        )

    def _theta_square(self, groups: GroupTable) -> torch.Tensor:
        """``sum theta ** 2`` of each group, float64."""
        out = torch.zeros(len(groups), dtype=torch.float64)
        by_name = dict(self.model.named_parameters())
        for name, members in groups.members.items():
            partitions: list[Partition | None] = [member.partition for member in members]
            norms = Dense(by_name[name].detach().unsqueeze(0)).norms(partitions)
            for member, values in zip(members, norms, strict=True):
                out[member.first : member.first + values.shape[1]] += values[0].double().cpu()
        return out

    def _max_positions(self) -> int | None:
        """How long a row may be, where positions are learned; None where they are computed."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        tokens = self._token_embeddings()
        for module in self.model.modules():
            if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings == limit:
                # RoBERTa counts positions from behind its padding index
                return limit - (0 if module.padding_idx is None else module.padding_idx + 1)
        return None

    def _pad_id(self) -> int:
        """Any id serves: pads are masked and bear no loss. A tokenizer without pad token is no problem."""
        for source in (self.tokenizer, self.model.config):
            pad = getattr(source, "pad_token_id", None)
            if isinstance(pad, int) and pad >= 0:
                return pad
        return 0

    def _pad_side(self, objective: Objective) -> Literal["left", "right"]:
        """Only models that are told their positions may be padded on the left."""
        if objective.labelling != "next":
            return "right"
        return "left" if getattr(self.tokenizer, "padding_side", "right") == "left" else "right"

    def _token_embeddings(self) -> Any:
        return plain_layer(self.model.get_input_embeddings())  # type: ignore[operator]

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        weight = next(self._token_embeddings().parameters())
        return weight.device, weight.dtype
