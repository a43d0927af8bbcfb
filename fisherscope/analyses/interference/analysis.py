"""Interference of every ordered pair of tasks on every head slice."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

import pandas as pd

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.context import Context
from fisherscope.analyses.interference.pairs import Health, PairScorer
from fisherscope.analyses.interference.result import MAPS, InterferenceResult
from fisherscope.analyses.outcome import SkipAnalysis
from fisherscope.analyses.registry import register
from fisherscope.analyses.slices import Loaded, SliceReader, gqa_map, stored_blocks
from fisherscope.analyses.top import TopPairs
from fisherscope.analyses.units import head_maps
from fisherscope.store import ContributionStore

_FRAME = ["task_a", "task_b", "stack", "layer", "block", "head", *MAPS, "flat"]
_PAIRS = ["task_a", "task_b", "sample_i", "sample_j", "stack", "layer", "block", "head", "score"]


@register("interference", requires=("gradients",), config=InterferenceConfig)
def interference(
    store: ContributionStore, config: InterferenceConfig, context: Context
) -> InterferenceResult:
    """Where samples of one task stress the Q, K, V and O slices that another task's samples move.

    Returns:
        An :class:`InterferenceResult` over all ordered pairs of tasks.

    Raises:
        SkipAnalysis: one task only (and ``include_self`` is off), or no slices of the wanted part.
    """
    pairs = [(a, b) for a, b in product(context.tasks, repeat=2) if a != b or config.include_self]
    if not pairs:
        raise SkipAnalysis(
            f"compares tasks, here is only {', '.join(context.tasks) or 'none'}; collect another task into "
            "the same store, or pass InterferenceConfig(include_self=True)"
        )
    if not stored_blocks(store, config.part):
        raise SkipAnalysis(
            f"no gradients of per-head {config.part} slices are stored: pass "
            'SampleGradients(parameters="attention") to scope.collect (some models have no such biases)'
        )
    reader = SliceReader(store, context.memory_budget)
    scorer = PairScorer(reader, context.tasks, config)
    rows, tops, places = _measure(store, scorer, pairs, config)
    frame = pd.DataFrame(rows, columns=_FRAME)
    return InterferenceResult(
        name="interference",
        config={**asdict(config), "form": "unsigned", "fisher_source": reader.source},
        frame=frame,
        data=head_maps(frame, MAPS, {"task_a": context.tasks, "task_b": context.tasks}),
        extra={"pairs": _pairs(store, tops, places)},
        details={"gqa": gqa_map(store), "samples": scorer.rows},
        warnings=_warnings(scorer, frame, config),
    )


def _measure(
    store: ContributionStore,
    scorer: PairScorer,
    pairs: list[tuple[str, str]],
    config: InterferenceConfig,
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], TopPairs], list[dict[str, Any]]]:
    """Rows per slice and pair of tasks, the best sample pairs, and the slice of each label."""
    tops = {pair: TopPairs(config.top_pairs) for pair in pairs}
    rows: list[dict[str, Any]] = []
    places: list[dict[str, Any]] = []
    for block in stored_blocks(store, config.part):
        denominators = scorer.denominators(block, pairs)
        for head in range(len(block)):
            loaded = Loaded(scorer.reader, block, head, scorer.rows)
            for (a, b), (fisher, lam) in denominators.items():
                measured = scorer.measure(loaded, a, b, fisher[head], lam, tops[a, b], len(places))
                health = Health.of(fisher[head], lam, config.epsilon)
                place = {"task_a": a, "task_b": b, **block.key, "head": head}
                rows.append({**place, **measured, **asdict(health)})
            places.append({**block.key, "head": head})
    return rows, tops, places


def _pairs(
    store: ContributionStore, tops: dict[tuple[str, str], TopPairs], places: list[dict[str, Any]]
) -> pd.DataFrame:
    samples = {task: store.samples(task) for task in {task for pair in tops for task in pair}}
    texts = all("text" in frame for frame in samples.values())
    rows = []
    for (a, b), top in tops.items():
        for score, (label, i, j) in zip(top.scores, top.places, strict=True):
            first, second = samples[a].iloc[i], samples[b].iloc[j]
            row = {"task_a": a, "task_b": b, "sample_i": first["id"], "sample_j": second["id"]}
            row |= {**places[label], "score": score}
            if texts:
                row |= {"text_i": first["text"], "text_j": second["text"]}
            rows.append(row)
    columns = [*_PAIRS, "text_i", "text_j"] if texts else _PAIRS
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def _warnings(scorer: PairScorer, frame: pd.DataFrame, config: InterferenceConfig) -> list[str]:
    notes = []
    for task, used in scorer.rows.items():
        n = scorer.reader.rows(task)
        if n < config.min_samples_for_fisher:
            notes.append(f"F of {task!r} is the mean of only {n} samples: its denominators are rough")
        if used < n:
            notes.append(f"pairs use the first {used} of the {n} samples of {task!r}; F uses all")
    if flat := int(frame["flat"].sum()):
        notes.append(
            f"{flat} of {len(frame)} slices have F = 0 throughout; their score is 0 and `flat` is set"
        )
    if not (frame["max"].abs() < float("inf")).all() and frame["max"].notna().any():
        notes.append("some scores are not finite: F of one task is 0 where the other's gradients are not")
    return notes
