"""The positions that carry the most opposed pairs, where gradients are stored by position."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.frames import ENDS
from fisherscope.analyses.conflict.position_factors import shared_side
from fisherscope.analyses.conflict.positions import carrying_positions_of_pairs
from fisherscope.analyses.context import Context
from fisherscope.analyses.slices import stored_blocks
from fisherscope.errors import MemoryBudgetError
from fisherscope.store import ContributionStore

POSITIONS = [*ENDS, "side", "position", "token", "contribution"]

# Multiplications that a report may spend on positions: some seconds. Long samples are for carrying_positions.
_MOST_WORK = 1e11


def look_into(
    store: ContributionStore, pairs: pd.DataFrame, config: ConflictConfig, context: Context
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Divide the cosines of the first found pairs of each two tasks among their positions.

    Nothing is done where gradients are not stored as factors, where the metric is not the pooled one of
    contributions (or Euclidean), in encoder-decoders, or beyond some seconds of work or the memory.

    Args:
        store: an open store.
        pairs: ``frame`` of the conflict analysis.
        config: its options.
        context: of the run.

    Returns:
        The pairs with ``cosine_low`` and ``cosine_high`` filled in, and one row per position: task_a, task_b,
        sample_a, sample_b, side ("a" or "b"), position, token (None where unknown), contribution.
    """
    chosen = _affordable(store, pairs, config) if _applies(store, config) else pairs.iloc[:0]
    if chosen.empty:
        return pairs, pd.DataFrame(columns=POSITIONS)
    try:
        views = carrying_positions_of_pairs(
            store,
            [*zip(chosen["sample_a"], chosen["sample_b"], strict=True)],
            config=config,
            seed=context.settings.seed,
            memory_budget=context.memory_budget,
            quiet=True,  # the analysis tells where it is
        )
    except MemoryBudgetError:  # as beyond so much work: carrying_positions says what it would take
        return pairs, pd.DataFrame(columns=POSITIONS)
    pairs = pairs.copy()
    pairs.loc[chosen.index, "cosine_low"] = [view.low for view in views]
    pairs.loc[chosen.index, "cosine_high"] = [view.high for view in views]
    frames = [view.frame.assign(pair=index) for view, index in zip(views, chosen.index, strict=True)]
    table = pd.concat(frames, ignore_index=True).merge(chosen[ENDS], left_on="pair", right_index=True)
    return pairs, table[POSITIONS].reset_index(drop=True)


def _applies(store: ContributionStore, config: ConflictConfig) -> bool:
    """Whether positions divide the very cosines of the pairs, without a model."""
    pooled = config.fisher_pool == "pooled" and config.fisher_weighting == "contribution"
    blocks = stored_blocks(store)
    parameters = {block.partition.parameter for block in blocks}
    try:
        shared_side(store, blocks)
    except ValueError:  # positions of an encoder are not those of its decoder
        return False
    return (
        (pooled or config.metric == "euclidean")
        and config.contribution_averaging_window == 1
        and all(store.encoding(name) == "factored" for name in parameters)
    )


def _affordable(store: ContributionStore, pairs: pd.DataFrame, config: ConflictConfig) -> pd.DataFrame:
    """The first found pairs of each two tasks that the work allows."""
    found = pairs[pairs["found"].astype(bool)]
    first = found.groupby(["task_a", "task_b"], sort=False).head(config.position_pairs)
    if first.empty:
        return first
    names = {block.partition.parameter for block in stored_blocks(store)}
    entries = sum(math.prod(store.layout.parameter(name).shape) for name in names)
    tasks = {*first["task_a"], *first["task_b"]}
    lengths = pd.concat([store.samples(task).set_index("id")["length"] for task in tasks])
    both = sum(lengths.loc[first[side]].to_numpy(np.float64) for side in ("sample_a", "sample_b"))
    work = np.cumsum(both**2 / 2 * entries)
    return first.iloc[: int(np.count_nonzero(work <= _MOST_WORK))]
