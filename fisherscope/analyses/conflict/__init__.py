"""How far samples of two tasks oppose each other: natural-gradient cosines, and tests of them."""

from fisherscope.analyses.conflict.analysis import conflict
from fisherscope.analyses.conflict.block_test import block_test
from fisherscope.analyses.conflict.calibrate import CalibrationResult, calibrate
from fisherscope.analyses.conflict.clustering import clusters, different_cluster_mean
from fisherscope.analyses.conflict.communities import communities
from fisherscope.analyses.conflict.corrections import adjust, adjust_directional, e_bh, e_values
from fisherscope.analyses.conflict.cosines import cosines, effect_size
from fisherscope.analyses.conflict.group_test import GroupTest, cauchy_combination, group_test
from fisherscope.analyses.conflict.pair_test import PairStatistics, pair_statistics, pair_test
from fisherscope.analyses.conflict.position_view import PositionView
from fisherscope.analyses.conflict.positions import carrying_positions, carrying_positions_of_pairs
from fisherscope.analyses.conflict.recommendations import Recommendations, recommend
from fisherscope.analyses.conflict.result import ConflictResult
from fisherscope.analyses.conflict.sample_test import sample_test
from fisherscope.analyses.conflict.whitening import whiten

__all__ = [
    "CalibrationResult",
    "ConflictResult",
    "GroupTest",
    "PairStatistics",
    "PositionView",
    "Recommendations",
    "adjust",
    "adjust_directional",
    "block_test",
    "calibrate",
    "carrying_positions",
    "carrying_positions_of_pairs",
    "cauchy_combination",
    "clusters",
    "communities",
    "conflict",
    "cosines",
    "different_cluster_mean",
    "e_bh",
    "e_values",
    "effect_size",
    "group_test",
    "pair_statistics",
    "pair_test",
    "recommend",
    "sample_test",
    "whiten",
]
