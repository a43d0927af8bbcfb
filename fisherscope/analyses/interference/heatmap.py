"""Interference of two tasks over layers and query heads, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import torch
import xarray as xr

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.interference.denominator import denominators
from fisherscope.analyses.interference.full import FullScorer
from fisherscope.analyses.interference.measuring import applied, rows_to_load, scorer_for
from fisherscope.analyses.interference.query import BUDGET, stored_names, warn_of_damping, warn_of_empty
from fisherscope.analyses.interference.totals import Extremes
from fisherscope.analyses.quantities import collecting_heads, without_heads
from fisherscope.analyses.slices import Loaded, SliceReader, find_block, stored_blocks
from fisherscope.store import ContributionStore
from fisherscope.torch_state import in_standard_state
from fisherscope.words import counted


class BlockHeatmap(TypedDict):
    """Heat map of one block.

    Attributes:
        layer_head_avg: mean score over all pairs of samples, axes (layer, head) with query heads; NaN where a
            layer has no such block or head. ``attrs`` tell form, pool, aggregate, normalisation, and whether
            K and V repeat the value of the kv head that several query heads use.
        top_conflicts: the pairs of samples with the highest scores, or the lowest below 0 where scores have a
            sign: dicts of sample_i, sample_j (positions in ``store.samples``), layer, head (the first wanted
                query
            head that uses the slice), score.
    """

    layer_head_avg: xr.DataArray
    top_conflicts: list[dict[str, Any]]


@in_standard_state
def compute_heatmap(
    store: ContributionStore,
    task_a: str,
    task_b: str,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    max_samples_per_task: int | None = None,
    *,
    stack: str | None = None,
    config: InterferenceConfig | None = None,
    memory_budget: int = BUDGET,
) -> dict[str, BlockHeatmap]:
    """Mean interference per layer and query head, and the pairs that stand out, for each block.

    Args:
        store: an open store.
        task_a, task_b: as in :func:`~fisherscope.analyses.interference.matrix`.
        layers: all of the stack whose gradients are stored, where None.
        heads: query heads; all where None.
        max_samples_per_task: takes the place of that of ``config`` where given.
        stack: of the layers; the only one where None, and the decoder where there are several.
        config: form of the score, and how many pairs of samples to keep; defaults where None.
        memory_budget: bytes of gradients to hold at a time.

    Returns:
        Per block ("Q", "K", "V", "O", and what a model has beside them) a :class:`BlockHeatmap`. Zeros, with
        a warning, where a task has no stored gradients.

    Raises:
        KeyError: no such task or layer, or its gradients are not stored.
        IndexError: no such head in any of the layers.
    """
    config = config or InterferenceConfig()
    if max_samples_per_task is not None:
        config = replace(config, max_samples_per_task=max_samples_per_task)
    stack = store.layout.stack_or_only(stack)
    chosen, wanted = _chosen(store, layers, heads, stack, config)
    reader = SliceReader(store, memory_budget, (task_a, task_b))
    empty = warn_of_empty(reader, (task_a, task_b))
    found: dict[str, BlockHeatmap] = {}
    tops: dict[str, tuple[Extremes, list[tuple[int, int]]]] = {}
    barely_damped = 0
    for number, layer in enumerate(chosen):
        for name in stored_names(store, layer, stack, config):
            if name not in found:
                found[name] = _blank(name, chosen, wanted, config)
                tops[name] = Extremes(config.top_pairs, signed=config.signed), []
            users = _users(store, layer, stack, name, wanted)
            means = found[name]["layer_head_avg"].values[number]
            if empty:
                means[[place for places in users.values() for place in places]] = 0.0
                continue
            scored = _Slices(reader, layer, stack, name, (task_a, task_b), config)
            for head, places in users.items():
                means[places] = scored.mean(head, *tops[name], (layer, wanted[places[0]]))
            barely_damped += scored.barely_damped
    if barely_damped:
        warn_of_damping(f"in {counted(barely_damped, 'slice')} lam is below")
    for name, (extremes, labels) in tops.items():
        found[name]["top_conflicts"] = [
            {"sample_i": i, "sample_j": j, "layer": labels[n][0], "head": labels[n][1], "score": score}
            for score, n, i, j in (extremes.lowest() if config.signed else extremes.found())
        ]
    return found


def _chosen(
    store: ContributionStore,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    stack: str,
    config: InterferenceConfig,
) -> tuple[list[int], list[int]]:
    """Layers and query heads; where None, all layers of the stack with stored gradients, and all heads."""
    stored = [b.attention for b in stored_blocks(store, config.part) if b.attention.stack == stack]
    if not stored:
        raise KeyError(
            without_heads(store)
            or f"{store.path} stores no gradients of per-head {config.part} slices of the {stack}: "
            + collecting_heads(store, config.part)
        )
    widest = max(a.n_heads for a in stored)
    wanted = list(range(widest)) if heads is None else list(heads)
    if bad := [head for head in wanted if not 0 <= head < widest]:
        raise IndexError(f"the layers have up to {widest} query heads, asked for {bad[0]}")
    return list(dict.fromkeys(a.layer for a in stored)) if layers is None else list(layers), wanted


class _Slices:
    """The slices of one block of one layer.

    Attributes:
        barely_damped: of how many lam is below the smallest non-zero eigenvalue of F, in the full form.
    """

    def __init__(
        self,
        reader: SliceReader,
        layer: int,
        stack: str,
        name: str,
        tasks: tuple[str, str],
        config: InterferenceConfig,
    ) -> None:
        self._reader, self._tasks = reader, tasks
        self.barely_damped = 0
        self._block = find_block(reader.store, layer, name, config.part, stack)
        self._scorer = scorer_for(reader, tuple(dict.fromkeys(tasks)), config)
        reader.hold(self._block, rows_to_load(self._scorer))
        self._fisher, self._lam = denominators(reader, self._block, [tasks], config)[tasks]

    def mean(
        self, head: int, extremes: Extremes, labels: list[tuple[int, int]], label: tuple[int, int]
    ) -> float:
        """Mean of M; its pairs are offered to ``extremes`` under a new label."""
        a, b = self._tasks
        total, pairs = 0.0, 0
        loaded = Loaded(self._reader, self._block, head, rows_to_load(self._scorer))
        for stretch in self._scorer.stretches(loaded, a, b, self._fisher[head], self._lam):
            extremes.offer(stretch, len(labels))
            total += float(stretch.scores.nansum(dtype=torch.float64))
            # a sample is not paired with itself
            pairs += stretch.scores.numel() - (len(stretch.scores) if a == b else 0)
        labels.append(label)
        if isinstance(self._scorer, FullScorer):
            self.barely_damped += self._scorer.solve(loaded, a, b).barely_damped
        return total / pairs if pairs else float("nan")


def _blank(name: str, layers: list[int], heads: list[int], config: InterferenceConfig) -> BlockHeatmap:
    options = applied(config)
    kept = ("part", "form", "aggregate", "fisher_pool", "normalize_gj")
    return {
        "layer_head_avg": xr.DataArray(
            np.full((len(layers), len(heads)), np.nan),
            dims=("layer", "head"),
            coords={"layer": layers, "head": heads},
            name=name,
            attrs={
                **{key: options[key] for key in kept},
                "note": "K and V repeat the value of the kv head that each query head uses",
            },
        ),
        "top_conflicts": [],
    }


def _users(
    store: ContributionStore, layer: int, stack: str, name: str, wanted: list[int]
) -> dict[int, list[int]]:
    """Places in ``wanted`` of the query heads that use each head of a block."""
    attention = store.layout.attention_layer(layer, stack)
    users: dict[int, list[int]] = {}
    for place, head in enumerate(wanted):
        if head < attention.n_heads:
            users.setdefault(attention.head_of(name, head), []).append(place)
    return users
