"""Where in the model found conflicts lie."""

from __future__ import annotations

import pandas as pd

_PLACE = ["stack", "layer", "block", "head"]
_PAIR = ["task_a", "task_b", "sample_a", "sample_b"]
COLUMNS = ["task_a", "task_b", "level", *_PLACE, "pairs", "share", "mean", "q"]


def hot_spots(heads: pd.DataFrame, levels: pd.DataFrame) -> pd.DataFrame:
    """Head slices and layers by the number of sample pairs that were called there.

    Args:
        heads: ``extra["heads"]`` of a conflict result, one row per pair and head slice that was called.
        levels: ``extra["levels"]``, of which mean and q of the place are taken.

    Returns:
        By pair of tasks and ``level`` ("slice", then "layer"), most pairs first: task_a, task_b, level,
        stack, layer, block, head (as in ``levels``: "" and -1 for a layer), pairs (called there; in a layer,
        in any of its slices), share (of all pairs of these tasks that were called anywhere; a pair called in
        two places counts in both), mean and q (the test of the place itself over all pairs, whatever was
        called; NaN where it was not tested). Places without a called pair are left out.
    """
    if heads.empty:
        return pd.DataFrame(columns=COLUMNS)
    slices = heads.assign(level="slice")
    layers = heads.assign(level="layer", block="", head=-1)
    places = pd.concat([slices, layers], ignore_index=True)
    key = ["task_a", "task_b", "level", *_PLACE]
    once = places[[*key, "sample_a", "sample_b"]].drop_duplicates()
    table = once.groupby(key, sort=False).size().rename("pairs").reset_index()
    called = heads[_PAIR].drop_duplicates().groupby(["task_a", "task_b"]).size().rename("called")
    table = table.merge(called.reset_index(), how="left", on=["task_a", "task_b"])
    table["share"] = table["pairs"] / table["called"]
    table = table.merge(levels[[*key, "mean", "q"]], how="left", on=key)
    # "slice" before "layer"; ties by place
    table["rank"] = (table["level"] == "layer").astype(int)
    table = table.sort_values(
        ["task_a", "task_b", "rank", "pairs", *_PLACE],
        ascending=[True, True, True, False, True, True, True, True],
        ignore_index=True,
    )
    return table[COLUMNS]
