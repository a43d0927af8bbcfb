"""Interference of chosen slices and samples, computed on demand."""

from __future__ import annotations

import torch
import xarray as xr

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.interference.form import gradient_scale, interference_matrix
from fisherscope.analyses.interference.pairs import PairScorer
from fisherscope.analyses.slices import Loaded, SliceReader, find_block
from fisherscope.store import ContributionStore

_BUDGET = 1 << 30


def matrix(
    store: ContributionStore,
    task_a: str,
    task_b: str,
    *,
    layer: int,
    block: str,
    head: int,
    stack: str = "decoder",
    config: InterferenceConfig | None = None,
    memory_budget: int = _BUDGET,
) -> xr.DataArray:
    """Interference of every pair of samples on one head slice.

    Args:
        store: an open store.
        task_a: whose samples lean on the entries (C and, by default, F).
        task_b: whose samples move them (g).
        layer, block, head, stack: the slice; a query head for Q and O, a kv head for K and V.
        config: form of the score; defaults where None.
        memory_budget: bytes of gradients to hold at a time.

    Returns:
        Axes (sample_a, sample_b) with the sample ids; ``attrs`` tell the slice, lam and the form. Where a
        task meets itself, the diagonal is NaN.

    Raises:
        KeyError: no such task or slice, or its gradients are not stored.
        IndexError: no such head.
    """
    config = config or InterferenceConfig()
    found = find_block(store, layer, block, config.part, stack)
    if not 0 <= head < len(found):
        raise IndexError(f"{block} of layer {layer} has {len(found)} heads, asked for {head}")
    reader = SliceReader(store, memory_budget)
    scorer = PairScorer(reader, tuple(dict.fromkeys((task_a, task_b))), config)
    fisher, lam = scorer.denominators(found, [(task_a, task_b)])[task_a, task_b]
    scores = torch.empty(scorer.rows[task_a], scorer.rows[task_b])
    loaded = Loaded(reader, found, head, scorer.rows)
    for rows, columns, part in scorer.scores(loaded, task_a, task_b, fisher[head], lam):
        scores[rows, columns] = part
    ids = [store.samples(task)["id"].to_numpy()[: scorer.rows[task]] for task in (task_a, task_b)]
    return xr.DataArray(
        scores.numpy(),
        dims=("sample_a", "sample_b"),
        coords={"sample_a": ids[0], "sample_b": ids[1]},
        name="interference",
        attrs={
            "task_a": task_a,
            "task_b": task_b,
            "stack": stack,
            "layer": layer,
            "block": block,
            "head": head,
            "part": config.part,
            "form": "unsigned",
            "aggregate": config.aggregate,
            "fisher_pool": config.fisher_pool,
            "normalize_gj": config.normalize_gj,
            "ridge": lam,
        },
    )


def sample_pair(
    store: ContributionStore,
    task_a: str,
    row_a: int,
    task_b: str,
    row_b: int,
    *,
    layer: int,
    head: int,
    stack: str = "decoder",
    config: InterferenceConfig | None = None,
) -> dict[str, float]:
    """Interference of one pair of samples on the four slices of one query head.

    Args:
        store: an open store.
        task_a, row_a: the sample that leans on the entries.
        task_b, row_b: the sample that moves them.
        layer, head, stack: the query head; K and V are those of the kv head that it uses, and so the same for
            all query heads that share it.
        config: form of the score; defaults where None.

    Returns:
        Score per block: ``{"Q": ..., "K": ..., "V": ..., "O": ...}``.

    Raises:
        KeyError: no such task, layer or block, or its gradients are not stored.
        IndexError: no such head or row.
    """
    config = config or InterferenceConfig()
    attention = store.layout.attention_layer(layer, stack)
    reader = SliceReader(store, _BUDGET)
    scorer = PairScorer(reader, tuple(dict.fromkeys((task_a, task_b))), config)
    for task, row in ((task_a, row_a), (task_b, row_b)):
        if not 0 <= row < reader.rows(task):
            raise IndexError(f"task {task!r} has {reader.rows(task)} samples, asked for row {row}")
    scale = gradient_scale(store, task_b, config.normalize_gj)
    factor = 1.0 if scale is None else float(scale[row_b])
    scores = {}
    for block in attention.blocks:
        part = block.part(config.part)
        if part is None or part.parameter not in store.gradient_parameters:
            continue
        found = find_block(store, layer, block.name, config.part, stack)
        piece = attention.head_of(block.name, head)
        fisher, lam = scorer.denominators(found, [(task_a, task_b)])[task_a, task_b]
        left = reader.normalised(task_a, found, piece, slice(row_a, row_a + 1)).square_()
        right = reader.gradients(task_b, found, piece, slice(row_b, row_b + 1)) * factor
        scores[block.name] = float(interference_matrix(left, fisher[piece], right, lam, config.aggregate))
    if not scores:
        raise KeyError(
            f"{store.path} stores no gradients of layer {layer}: collect it with "
            "SampleGradients(parameters='attention')"
        )
    return scores
