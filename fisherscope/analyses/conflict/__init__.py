"""How far samples of two tasks oppose each other: natural-gradient cosines, and tests of them."""

from fisherscope.analyses.conflict.analysis import conflict
from fisherscope.analyses.conflict.block_test import block_test
from fisherscope.analyses.conflict.corrections import adjust, adjust_directional, e_bh, e_values
from fisherscope.analyses.conflict.cosines import cosines, effect_size, whiten
from fisherscope.analyses.conflict.group_test import GroupTest, cauchy_combination, group_test
from fisherscope.analyses.conflict.pair_test import PairStatistics, pair_statistics, pair_test
from fisherscope.analyses.conflict.result import ConflictResult
from fisherscope.analyses.conflict.sample_test import sample_test

__all__ = [
    "ConflictResult",
    "GroupTest",
    "PairStatistics",
    "adjust",
    "adjust_directional",
    "block_test",
    "cauchy_combination",
    "conflict",
    "cosines",
    "e_bh",
    "e_values",
    "effect_size",
    "group_test",
    "pair_statistics",
    "pair_test",
    "sample_test",
    "whiten",
]
