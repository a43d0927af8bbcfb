"""Reading a store: samples in task order, gradients, aggregates. Neither a model nor libhdf5 is needed."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from fisherscope.errors import UsageError
from fisherscope.layout import ParameterSlice
from fisherscope.layout.attention import Part
from fisherscope.linalg import PerSampleGradient
from fisherscope.store import (
    aggregates,
    encoded,
    gradients,
    kronecker,
    lookup,
    memory,
    positions,
    proofs,
    tables,
)
from fisherscope.store.kronecker import KroneckerFactors
from fisherscope.store.opened import OpenStore, following
from fisherscope.store.token_texts import read_token_texts
from fisherscope.torch_state import in_standard_state

Samples: TypeAlias = slice | Sequence[int] | NDArray[np.int64] | None


def open_store(path: str | Path, memory_budget: int | str | None = None) -> ContributionStore:
    """Open a contribution store for reading.

    A store that is still being written shows what is committed now; :meth:`ContributionStore.refresh`
    looks again.

    Args:
        path: the directory that ``collect`` wrote.
        memory_budget: bytes, or a text such as "2GB", that one call for gradients may take; by default half
            of the memory that is free now.

    Raises:
        StoreFormatError: the directory is not a store, or one of another format version, or it needs what
            only a later fisherscope knows.
        CorruptStoreError: its journals or ``store.json`` are damaged.
        ValueError: ``memory_budget`` is no amount of memory.
    """
    return ContributionStore(path, memory_budget)


def as_store(store: ContributionStore | str | Path) -> ContributionStore:
    """An open store as it is, or the store of a path, opened.

    Raises:
        ValueError: it is neither.
        StoreFormatError, CorruptStoreError: as for :func:`open_store`.
    """
    if isinstance(store, ContributionStore):
        return store
    if not isinstance(store, str | Path):
        raise UsageError(
            f"a {type(store).__name__} is no store: pass one store, or the path of its directory. Several "
            "tasks are compared where they are collected into one store"
        )
    return open_store(store)


class ContributionStore(OpenStore):
    """A contribution store, read-only. Picklable (by its path); files are opened when they are needed.

    Samples always come in task order. ``samples=`` takes a slice or a list of positions in the table
    :meth:`samples`, which are the row numbers once the task is complete.

    Attributes:
        path: the store's directory.
        header: what the store is a store of.
        memory_budget: bytes that one call for samples' values may take, result included.
    """

    @following
    def samples(self, task: str) -> pd.DataFrame:
        """The committed samples of a task, in task order.

        Returns:
            Columns id, row, key, length (attended positions), tokens (labels that bear loss), loss (sum
            over them, nats), truncated (tokens cut off) and, where texts are stored, text.
        """
        return tables.samples(self, self._task(task))

    @following
    def token_ids(self, task: str, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Input ids and labels (-100: no loss) of one sample.

        Raises:
            KeyError: no such row is committed.
            NotStoredError: ids were not stored.
        """
        return tables.token_ids(self, self._task(task), row)

    def token_texts(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> list[str | None]:
        """How tokens read; None for those whose text is not stored.

        Texts are there where a tokenizer was at hand and texts were to be stored. A token that is part of a
        character has the tokenizer's own spelling.

        Raises:
            CorruptStoreError: the file that holds them is damaged.
        """
        if self._token_texts is None:
            self._token_texts = read_token_texts(self.path)
        return [self._token_texts.get(int(token)) for token in ids]

    @following
    def token_types(self, task: str, row: int) -> NDArray[np.int32] | None:
        """Which of two texts each position of a sample belongs to; None where that was not given."""
        return tables.token_types(self, self._task(task), row)

    @following
    @in_standard_state
    def gradients(self, task: str, parameter: str, samples: Samples = None) -> Tensor:
        """Per-sample gradients g_i of the summed loss, signed, in whichever encoding they are stored.

        Returns:
            ``[n, *shape]``, float32. Where :meth:`encoding` is "lowrank" they are approximations, and
            :meth:`encoding_errors` tells how good.

        Raises:
            KeyError: no such task or parameter.
            NotStoredError: gradients of this parameter were not collected.
            MemoryBudgetError: so many samples do not fit.
            CorruptStoreError: a shard is missing or damaged.
        """
        index = self._task(task)
        chosen = index.select(samples)
        size = math.prod(self.layout.parameter(lookup.gradients_stored(self.header, parameter)).shape)
        memory.refuse_beyond(self.memory_budget, f"gradients of {parameter}", len(chosen), 4 * size)
        return gradients.read_parameter(self, index, parameter, chosen)

    @following
    @in_standard_state
    def per_sample(self, task: str, parameter: str, samples: Samples = None) -> PerSampleGradient:
        """Per-sample gradients g_i in the representation in which they are stored.

        Norms, inner products and slices of factors need no gradient of full size: see ``fisherscope.linalg``.

        Returns:
            A :class:`~fisherscope.linalg.Dense`, a :class:`~fisherscope.linalg.Factored` whose positions are
            padded with zeros, or a :class:`~fisherscope.linalg.LowRank`; float32.

        Raises:
            KeyError: no such task or parameter.
            NotStoredError: gradients of this parameter were not collected.
            MemoryBudgetError: so many samples do not fit.
            CorruptStoreError: a shard is missing or damaged.
        """
        index = self._task(task)
        return encoded.read(
            self, index, lookup.gradients_stored(self.header, parameter), index.select(samples)
        )

    def stream(self, task: str, parameter: str) -> Iterator[tuple[builtins.slice, PerSampleGradient]]:
        """All gradients of a parameter, so many samples at a time as fit the memory budget.

        Yields:
            Which samples, and what :meth:`per_sample` gives for them.

        Raises:
            KeyError: no such task or parameter.
            NotStoredError: gradients of this parameter were not collected.
            MemoryBudgetError: not even one sample fits.
            CorruptStoreError: a shard is missing or damaged.
        """
        pieces = self._pieces(task, lookup.gradients_stored(self.header, parameter))
        return ((piece, self.per_sample(task, parameter, piece)) for piece in pieces)

    @following
    def _pieces(self, task: str, parameter: str) -> list[builtins.slice]:
        return list(encoded.pieces(self, self._task(task), parameter))

    def encoding(self, parameter: str) -> str:
        """How the gradients of a parameter are stored.

        Returns:
            "dense" (as they are), "factored" (by position, exact), "lowrank" (the first singular vectors of
            each), or "groups" where there are group values alone.

        Raises:
            KeyError: the model has no such parameter.
            NotStoredError: it was not instrumented.
        """
        if lookup.known(self.header, parameter) in self.header.gradient_parameters:
            return self.header.encodings.encoding(parameter)
        lookup.instrumented(self.header, parameter)
        return "groups"

    @following
    def encoding_errors(self, task: str) -> pd.DataFrame:
        """How far stored gradients of low rank are from those that were computed.

        Returns:
            ``||g_i - stored|| / ||g_i||`` (Frobenius) as float32, one row per sample with its id as index,
            and one column per parameter whose :meth:`encoding` is "lowrank"; all others are exact up to
            rounding. NaN for samples whose gradients were left out.

        Raises:
            KeyError: no such task.
        """
        return encoded.errors(self, self._task(task))

    @following
    @in_standard_state
    def slice(
        self,
        task: str,
        *,
        layer: int,
        block: str,
        head: int,
        part: Part = "weight",
        stack: str | None = None,
        samples: Samples = None,
    ) -> Tensor:
        """Per-sample gradients of one head: a query head for Q and O, a kv head for K and V.

        Of dense gradients the bytes of that head only are read; of factors the other side is, too.
        ``stack`` is the only one where None, and the decoder where there are several.

        Returns:
            ``[n, slice size]``, float32, each slice in the parameter's memory order.

        Raises:
            KeyError: no such task, layer, block or bias.
            IndexError: no such head.
            NotStoredError: gradients of this block were not collected.
            MemoryBudgetError: so many samples do not fit.
            CorruptStoreError: a shard is missing or damaged.
        """
        self.layout.slice(layer, block, head, part=part, stack=stack)  # names what there is
        return self._slices(task, layer, block, part, stack, samples, slice(head, head + 1))[0]

    @following
    @in_standard_state
    def slices(
        self,
        task: str,
        *,
        layer: int,
        block: str,
        part: Part = "weight",
        stack: str | None = None,
        samples: Samples = None,
    ) -> Tensor:
        """Per-sample gradients of all heads of a block, in one read.

        Returns:
            ``[heads, n, slice size]``, float32; as :meth:`slice` for each head.
        """
        return self._slices(task, layer, block, part, stack, samples, slice(None))

    def _slices(
        self,
        task: str,
        layer: int,
        block: str,
        part: Part,
        stack: str | None,
        samples: Samples,
        heads: builtins.slice,
    ) -> Tensor:
        index = self._task(task)
        first = self.layout.slice(layer, block, 0, part=part, stack=stack)
        lookup.gradients_stored(self.header, first.parameter)
        partition = self.layout.attention_layer(layer, stack).block(block).part(part)
        assert partition is not None
        chosen, count = index.select(samples), len(partition.starts[heads])
        what = f"slices of {block} of layer {layer}"
        memory.refuse_beyond(self.memory_budget, what, len(chosen), 4 * count * partition.slice_size)
        return gradients.read_heads(self, index, partition, chosen, heads)

    @following
    @in_standard_state
    def fisher(self, task: str, parameter: str, labels: str = "data") -> Tensor:
        """Diagonal Fisher F = mean over samples of h_i ** 2, merged over ranks.

        Covers the samples of the last snapshots: :meth:`fisher_count` says how many.

        Args:
            task: the task.
            parameter: an instrumented parameter.
            labels: "data" (empirical), "sampled" or "exact" (of the model's own predictions), or
                "exact_per_token" (the data's labels, each its own unit).

        Returns:
            ``[*shape]``, float32. Float64 where a value is beyond what float32 holds (1.2e-38 to 3.4e38), as
            that of gradients below 1e-19 is.

        Raises:
            KeyError: no such task or parameter.
            NotStoredError: no full-shape Fisher of these labels was collected.
        """
        return aggregates.mean_of(
            self, self._task(task), lookup.instrumented(self.header, parameter), f"fisher/{labels}"
        )

    @following
    @in_standard_state
    def fisher_slice(
        self,
        task: str,
        *,
        layer: int,
        block: str,
        head: int,
        part: Part = "weight",
        stack: str | None = None,
        labels: str = "data",
    ) -> Tensor:
        """Diagonal Fisher of one head.

        Returns:
            ``[slice size]``, in the order of :meth:`slice` and of the type that :meth:`fisher` has.
        """
        piece: ParameterSlice = self.layout.slice(layer, block, head, part=part, stack=stack)
        parameter = lookup.instrumented(self.header, piece.parameter)
        index = self._task(task)
        return aggregates.mean_of(self, index, parameter, f"fisher/{labels}", piece).reshape(-1)

    def fisher_count(self, task: str) -> int:
        """Number of samples that :meth:`fisher` and :meth:`mean` cover; it may lag behind."""
        return sum(snapshot.count for snapshot in self._task(task).snapshots)

    @following
    @in_standard_state
    def mean(self, task: str, parameter: str) -> Tensor:
        """Mean over samples of the normalised gradient h_i.

        Returns:
            ``[*shape]``, float32; float64 where a value is beyond what float32 holds.

        Raises:
            KeyError: no such task or parameter.
            NotStoredError: it was not collected.
        """
        return aggregates.mean_of(self, self._task(task), lookup.instrumented(self.header, parameter), "mean")

    @following
    @in_standard_state
    def kronecker(self, task: str, module: str) -> KroneckerFactors:
        """Kronecker factors A and S of one linear map, merged over ranks.

        Args:
            task: the task.
            module: path of the map, such as "model.layers.0.self_attn.q_proj".

        Returns:
            :class:`KroneckerFactors`, with the formula; its ``head`` cuts S to a head of Q, K or V and A to
            one of O.

        Raises:
            KeyError: no such task or module.
            NotStoredError: they were not collected.
        """
        return kronecker.read_factors(self, self._task(task), module)

    @following
    @in_standard_state
    def position_contributions(
        self, task: str, parameter: str, samples: Samples = None, *, block: str | None = None
    ) -> list[Tensor]:
        """What each position adds to a sample's squared gradient norm of one matrix.

        With g = sum_t g_t, g_t = d_t a_t', position t contributes <g_t, g>. Contributions may be negative;
        those of a sample add up to ||g||^2, and those of a head to the squared norm of its slice.

        Args:
            task: the task.
            parameter: the matrix.
            samples: positions in the table :meth:`samples`; all by default.
            block: such as "Q": contributions to the slices of its heads.

        Returns:
            For each sample, in task order, ``[positions]`` float32, in the order of :meth:`token_ids`; with a
            ``block`` ``[heads, positions]``, where heads are kv heads for K and V. In the decoder of an
            encoder-decoder, positions are those of the labels.

        Raises:
            KeyError: no such task, parameter or block.
            NotStoredError: they were not collected.
        """
        index = self._task(task)
        return positions.read_contributions(self, index, parameter, index.select(samples), block)

    @following
    def aggregate(self, task: str, name: str) -> Tensor:
        """One array of the snapshots, added over ranks in float64.

        Raises:
            NotStoredError: the snapshots have no such array.
        """
        return aggregates.total(self, self._task(task), name)

    @following
    def constants(self) -> dict[str, NDArray[Any]]:
        """Arrays that hold for the whole store, such as ``groups/theta_square``."""
        return aggregates.constants(self)

    def evidence(self, about: str) -> list[dict[str, Any]]:
        """What was found out about what is stored, rank by rank in the order in which it was found.

        Args:
            about: which kind of finding, such as "proof": how gradients were compared with autograd.

        Returns:
            JSON data of each finding; none where nothing was looked at.
        """
        found = (record for ledger in self.ledgers for record in ledger.evidence)
        return [dict(record.values) for record in found if record.about == about]

    def proofs(self) -> dict[str, dict[str, Any]]:
        """What comparing batches with ordinary backward passes came to, by task: see ``collect(check=)``.

        Returns:
            By task: batches (that were run), proved, not_provable (for want of memory), largest_deviation (of
            the proofs, relative), largest_at (of what), tolerance (what would be rounding),
            smallest_error_seen (the smallest relative error of one sample's gradient that could not have
            passed), dtype (the coarsest of the passes), in_words and cannot_see.
        """
        return proofs.proofs(self)

    @following
    @in_standard_state
    def groups(self, task: str, labels: str = "data") -> pd.DataFrame:
        """Contributions per group, over all committed samples of a task, in float64.

        Args:
            task: the task.
            labels: "data", or another label source that was collected; then as of the last snapshots.

        Returns:
            Columns kind, stack, layer, block, index, part, parameter, size; count (samples); sum (mean over
            samples of the group's sum of C_i); mean (sum / size); variance (unbiased, over samples, of the
            group's mean C_i); theta_square (sum of squared parameters, NaN if it was not stored).
        """
        return tables.groups(self, self._task(task), labels)

    @following
    @in_standard_state
    def group_values(self, task: str, samples: Samples = None) -> xr.Dataset:
        """Per sample and group ``square`` = sum g^2 and ``dot`` = <g, theta>, of the raw gradients g_i.

        Squares are float64: that of 1e-25 is less than float32 holds.

        Returns:
            Dimensions sample, group; coordinates id, row, tokens and the columns of the group table.
        """
        index = self._task(task)
        chosen = index.select(samples)
        memory.refuse_beyond(self.memory_budget, "group values", len(chosen), 12 * len(self.group_table))
        return tables.group_values(self, index, chosen)

    @following
    def group_contributions(self, task: str) -> NDArray[np.float64]:
        """Contributions per sample and group, ``[n, groups]``: the group's sum of C_i = h_i ** 2."""
        return tables.group_contributions(self, self._task(task))

    def __repr__(self) -> str:
        return tables.representation(self)

    def _repr_html_(self) -> str:
        return tables.html(self)
