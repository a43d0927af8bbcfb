"""Interference of chosen slices and samples, computed on demand."""

from __future__ import annotations

import warnings

import torch
import xarray as xr

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.interference.denominator import denominators
from fisherscope.analyses.interference.form import FORMS, gradient_scale, interference_matrix
from fisherscope.analyses.interference.full import FullScorer
from fisherscope.analyses.interference.measuring import applied, nothing_stored, rows_to_load, scorer_for
from fisherscope.analyses.quantities import collecting_heads
from fisherscope.analyses.slices import Block, Loaded, SliceReader, find_block
from fisherscope.errors import UsageError
from fisherscope.store import ContributionStore
from fisherscope.torch_state import in_standard_state
from fisherscope.words import counted

BUDGET = 1 << 30


@in_standard_state
def matrix(
    store: ContributionStore,
    task_a: str,
    task_b: str,
    *,
    layer: int,
    block: str,
    head: int,
    stack: str | None = None,
    config: InterferenceConfig | None = None,
    leave_pair_out: bool = False,
    memory_budget: int = BUDGET,
) -> xr.DataArray:
    """Interference of every pair of samples on one head slice.

    Args:
        store: an open store.
        task_a: whose samples lean on the entries (C and, by default, F).
        task_b: whose samples move them (g).
        layer, block, head: the slice; a query head for Q and O, a kv head for K and V.
        stack: of the layer; the only one where None, and the decoder where there are several.
        config: form of the score; defaults where None.
        leave_pair_out: for the form "full": F without the two samples of each pair, as in lists of pairs.
        memory_budget: bytes of gradients to hold at a time.

    Returns:
        Axes (sample_a, sample_b) with the sample ids, float32 (float64 for gradients far from 1);
        ``attrs`` tell the slice, lam and the form. Where a task meets itself, the diagonal is NaN. Zeros,
        with a warning, where a task has no stored gradients.

    Raises:
        KeyError: no such task or slice, or its gradients are not stored.
        IndexError: no such head.
        ValueError: ``leave_pair_out`` with another form than "full".
    """
    config = config or InterferenceConfig()
    if leave_pair_out and config.form != "full":
        raise UsageError(f"leave_pair_out is for the form 'full', not for {config.form!r}")
    found = find_block(store, layer, block, config.part, stack)
    if not 0 <= head < len(found):
        raise IndexError(f"{block} of layer {layer} has {counted(len(found), 'head')}, asked for {head}")
    reader = SliceReader(store, memory_budget, (task_a, task_b))
    scores, lam = _scores(reader, found, head, (task_a, task_b), config, leave_pair_out=leave_pair_out)
    samples = [store.samples(task)["id"].to_numpy() for task in (task_a, task_b)]
    options = applied(config)
    kept = ("part", "form", "aggregate", "fisher_pool", "normalize_gj")
    return xr.DataArray(
        scores.numpy(),
        dims=("sample_a", "sample_b"),
        coords={
            axis: ids[:n]
            for axis, ids, n in zip(("sample_a", "sample_b"), samples, scores.shape, strict=True)
        },
        name="interference",
        attrs={
            "task_a": task_a,
            "task_b": task_b,
            **found.key,
            "head": head,
            **{name: options[name] for name in kept},
            "ridge": lam,
        },
    )


@in_standard_state
def compute_sample_pair(
    store: ContributionStore,
    task_a: str,
    sample_i: int,
    task_b: str,
    sample_j: int,
    layer: int,
    head: int,
    *,
    stack: str | None = None,
    config: InterferenceConfig | None = None,
) -> dict[str, float]:
    """Interference of one pair of samples on the four slices of one query head.

    Args:
        store: an open store.
        task_a, sample_i: the sample that leans on the entries, by its position in ``store.samples(task_a)``.
        task_b, sample_j: the sample that moves them.
        layer, head: the query head; K and V are those of the kv head that it uses, and so the same for all
            query heads that share it.
        stack: of the layer; the only one where None, and the decoder where there are several.
        config: form of the score; defaults where None. With the form "full", F is that of the other samples.

    Returns:
        Score per block: ``{"Q": ..., "K": ..., "V": ..., "O": ...}``. Zeros, with a warning, where a task has
        no stored gradients.

    Raises:
        KeyError: no such task, layer or block, or its gradients are not stored.
        IndexError: no such head, or no such sample, or one whose gradients are not stored.
        ValueError: a sample with itself.
    """
    config = config or InterferenceConfig()
    attention = store.layout.attention_layer(layer, stack)
    attention.kv_head(head)
    blocks = stored_names(store, layer, stack, config)
    reader = SliceReader(store, BUDGET, (task_a, task_b))
    for task, row in ((task_a, sample_i), (task_b, sample_j)):
        n, stored = reader.rows(task), reader.stored(task)
        if not 0 <= row < (stored or n):
            raise IndexError(
                f"task {task!r} has {counted(n, 'sample')}, and gradients of the first {stored}: asked for "
                f"row {row}"
            )
    if (task_a, sample_i) == (task_b, sample_j):
        raise UsageError(
            f"sample {sample_i} of {task_a!r} does not interfere with itself: choose two samples"
        )
    if warn_of_empty(reader, (task_a, task_b)):
        return dict.fromkeys(blocks, 0.0)
    found = {}
    for name in blocks:
        block = find_block(store, layer, name, config.part, stack)
        piece = attention.head_of(name, head)
        if config.form == "full":
            scores, _ = _scores(reader, block, piece, (task_a, task_b), config, leave_pair_out=True)
            found[name] = float(scores[sample_i, sample_j])
        else:
            found[name] = _single(reader, block, piece, (task_a, sample_i), (task_b, sample_j), config)
    return found


def stored_names(
    store: ContributionStore, layer: int, stack: str | None, config: InterferenceConfig
) -> list[str]:
    """Blocks of a layer whose gradients are stored.

    Raises:
        KeyError: no such layer, or none is.
    """
    stored = set(store.gradient_parameters)
    parts = [
        (block.name, block.part(config.part)) for block in store.layout.attention_layer(layer, stack).blocks
    ]
    if found := [name for name, part in parts if part is not None and part.parameter in stored]:
        return found
    raise KeyError(
        f"{store.path} stores no gradients of layer {layer}: " + collecting_heads(store, config.part)
    )


def warn_of_empty(reader: SliceReader, tasks: tuple[str, str]) -> bool:
    """Whether one of the tasks has no stored gradients at all, with a warning."""
    empty = [task for task in dict.fromkeys(tasks) if not reader.stored(task)]
    for task in empty:
        warnings.warn(nothing_stored(reader, task), stacklevel=4)
    return bool(empty)


def warn_of_damping(what: str) -> None:
    """Warn that in-sample scores of the full form tell little."""
    warnings.warn(
        f"{what} the smallest non-zero eigenvalue of F: scores come near the identity matrix, whatever the "
        "samples; raise ridge_rel",
        stacklevel=5,
    )


def _scores(
    reader: SliceReader,
    block: Block,
    head: int,
    tasks: tuple[str, str],
    config: InterferenceConfig,
    *,
    leave_pair_out: bool,
) -> tuple[torch.Tensor, float]:
    """M of one slice ``[n_a, n_b]``, and lam."""
    a, b = tasks
    if warn_of_empty(reader, tasks):
        return torch.zeros(
            *(reader.rows(task, config.max_samples_per_task) for task in tasks),
            dtype=torch.float32,
            device="cpu",
        ), float("nan")
    scorer = scorer_for(reader, tuple(dict.fromkeys(tasks)), config)
    fisher, lam = denominators(reader, block, [tasks], config)[tasks]
    loaded = Loaded(reader, block, head, rows_to_load(scorer))
    kind = torch.float64 if reader.exponent else torch.float32
    scores = torch.empty(scorer.rows[a], scorer.rows[b], dtype=kind, device="cpu")
    for stretch in scorer.stretches(loaded, a, b, fisher[head], lam):
        chosen = stretch.reported if leave_pair_out else stretch.scores
        assert chosen is not None
        scores[stretch.rows, stretch.columns] = chosen
    if isinstance(scorer, FullScorer):
        solved = scorer.solve(loaded, a, b)
        lam = solved.lam
        if solved.barely_damped:
            shown, smallest = reader.lam_of(lam), reader.lam_of(solved.smallest)
            warn_of_damping(f"lam = {shown:.3g} is below {smallest:.3g},")
    return scores, reader.lam_of(lam)


def _single(
    reader: SliceReader,
    block: Block,
    head: int,
    first: tuple[str, int],
    second: tuple[str, int],
    config: InterferenceConfig,
) -> float:
    """The score of two samples, of which alone gradients are read; F may be read of all."""
    assert config.form != "full"
    (a, i), (b, j) = first, second
    fisher, lam = denominators(reader, block, [(a, b)], config)[a, b]
    left = reader.normalised(a, block, head, slice(i, i + 1))
    if config.one_sided:
        right = reader.gradients(b, block, head, slice(j, j + 1))
        scale = gradient_scale(reader.store, b, config.normalize_gj)
        if scale is not None:
            right = right * scale[j]
    else:
        right = reader.normalised(b, block, head, slice(j, j + 1))
    aggregate = config.aggregate
    found = interference_matrix(left, right, fisher[head], lam, form=config.form, aggregate=aggregate)
    return float(found) * 2.0 ** (-reader.exponent * FORMS[config.form].degree)
