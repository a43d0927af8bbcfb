"""Whether samples of two tasks oppose each other on a slice: what interference itself cannot tell."""

from __future__ import annotations

import pandas as pd

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.context import Context
from fisherscope.errors import FisherscopeError

CLAIM = ["cosine", "cosine_p", "cosine_q"]
_PLACE = ["task_a", "task_b", "stack", "layer", "block", "head"]


def with_claims(
    frame: pd.DataFrame, context: Context, config: InterferenceConfig
) -> tuple[pd.DataFrame, list[str]]:
    """Add the mean cosine of each pair of tasks on each slice, and the test of it, out of `conflict`.

    The test is that of means against a margin, clustered by samples; both orders of two tasks have the same.

    Args:
        frame: one row per ordered pair of tasks and slice.
        context: of the run, whose conflict analysis is asked.
        config: options of interference.

    Returns:
        The frame with the columns cosine, cosine_p and cosine_q, and notes on why they are NaN: where slices
        are those of biases, or one task is analysed alone, there is nothing to note.
    """
    nothing = frame.assign(**dict.fromkeys(CLAIM, float("nan")))
    if config.part == "bias" or not context.pairs:
        return nothing, []
    try:
        conflict = context.result("conflict")
    except FisherscopeError as error:
        return nothing, [f"whether samples oppose each other on a slice was not tested: {error}"]
    levels, calibration = conflict.extra["levels"], conflict.extra["calibration"]
    withheld = calibration[(calibration["test"] == "blocks") & calibration["calibrated"].eq(False)]
    notes = [
        f"q-values of mean cosines of {a} and {b} are withheld: the test called too much on random halves of "
        "single tasks (see conflict)"
        for a, b in zip(withheld["task_a"], withheld["task_b"], strict=True)
    ]
    slices = levels[levels["level"] == "slice"]
    if slices.empty:
        return nothing, []
    slices = slices.rename(columns={"mean": "cosine", "p": "cosine_p", "q": "cosine_q"})[[*_PLACE, *CLAIM]]
    mirrored = slices.rename(columns={"task_a": "task_b", "task_b": "task_a"})
    return frame.merge(pd.concat([slices, mirrored]), how="left", on=_PLACE), notes
