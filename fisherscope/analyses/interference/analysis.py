"""Interference of every ordered pair of tasks on every head slice."""

from __future__ import annotations

from itertools import product

import pandas as pd

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.context import Context
from fisherscope.analyses.interference.measuring import Measured, Measurement, applied, nothing_stored
from fisherscope.analyses.interference.result import MAPS, InterferenceResult
from fisherscope.analyses.interference.signed import with_claims
from fisherscope.analyses.outcome import SkipAnalysis
from fisherscope.analyses.quantities import collecting_heads
from fisherscope.analyses.registry import register
from fisherscope.analyses.slices import SliceReader, gqa_map, stored_blocks
from fisherscope.analyses.units import head_maps
from fisherscope.store import ContributionStore
from fisherscope.words import counted, several

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
            f"no gradients of per-head {config.part} slices are stored: "
            + collecting_heads(store, config.part)
        )
    reader = SliceReader(store, context.memory_budget, context.tasks)
    measurement = Measurement(reader, context.tasks, config, context.rng, context.tell)
    found = measurement.run(pairs)
    frame, why_not = with_claims(pd.DataFrame(found.rows), context, config)
    frame = frame[_FRAME]
    return InterferenceResult(
        name="interference",
        config={**applied(config), "fisher_source": "gradients" if config.form == "full" else reader.source},
        frame=frame,
        data=head_maps(frame, MAPS, {"task_a": context.tasks, "task_b": context.tasks}),
        extra={"pairs": _pairs(store, found)},
        details={"gqa": gqa_map(store), "samples": measurement.scorer.rows},
        warnings=[*_warnings(reader, measurement, found, frame, config), *why_not],
    )


def _pairs(store: ContributionStore, found: Measured) -> pd.DataFrame:
    samples = {task: store.samples(task) for task in {task for pair in found.extremes for task in pair}}
    texts = all("text" in frame for frame in samples.values())
    rows = []
    for (a, b), extremes in found.extremes.items():
        for score, label, i, j in extremes.found():
            first, second = samples[a].iloc[i], samples[b].iloc[j]
            row = {"task_a": a, "task_b": b, "sample_i": first["id"], "sample_j": second["id"]}
            row |= {**found.places[label], "score": score}
            if texts:
                row |= {"text_i": first["text"], "text_j": second["text"]}
            rows.append(row)
    columns = [*_PAIRS, "text_i", "text_j"] if texts else _PAIRS
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True, key=abs)


def _warnings(
    reader: SliceReader,
    measurement: Measurement,
    found: Measured,
    frame: pd.DataFrame,
    config: InterferenceConfig,
) -> list[str]:
    notes = []
    for task, used in measurement.scorer.rows.items():
        notes += task_notes(reader, task, used, config)
    if flat := int(frame["flat"].sum()):
        notes.append(
            f"{flat} of {counted(len(frame), 'slice')} {several(flat, 'has', 'have')} F = 0 throughout; the "
            "score there is 0 and `flat` is set"
        )
    if not (frame["max"].abs() < float("inf")).all() and frame["max"].notna().any():
        notes.append("some scores are not finite: F of one task is 0 where the other's gradients are not")
    if found.barely_damped:
        notes.append(
            f"in {found.barely_damped} of {counted(len(frame), 'slice')} the damping is below the "
            "smallest non-zero eigenvalue of F: scores there come near the identity matrix, whatever the "
            "samples; raise ridge_rel"
        )
    return notes


def task_notes(reader: SliceReader, task: str, used: int, config: InterferenceConfig) -> list[str]:
    """What must be known of one task, of which ``used`` samples form pairs."""
    n, stored = reader.rows(task), reader.stored(task)
    if not used:
        return [nothing_stored(reader, task)]
    notes = []
    behind = n if reader.source == "full" and config.form != "full" else stored
    if behind < config.min_samples_for_fisher:
        notes.append(
            f"F of {task!r} is the mean of only {counted(behind, 'sample')}: its denominators are rough. "
            f"Each sample makes up 1/{behind} of that F, so that none stands out by more than a factor of "
            f"{behind}, and entries count most where F is small by chance"
        )
    if used < stored:
        notes.append(f"pairs use the first {used} of the {n} samples of {task!r}; F uses all")
    elif used < n:
        uses = "all" if behind == n else "these alone"
        notes.append(
            f"pairs use the first {used} of the {n} samples of {task!r}: gradients of the others are not "
            f"stored; F uses {uses}"
        )
    return notes
