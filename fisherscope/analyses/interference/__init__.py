"""Where samples of one task stress the attention slices that another task's samples move."""

from fisherscope.analyses.interference.analysis import interference
from fisherscope.analyses.interference.form import interference_matrix
from fisherscope.analyses.interference.heatmap import BlockHeatmap, compute_heatmap
from fisherscope.analyses.interference.permutation import OverlapTest
from fisherscope.analyses.interference.query import compute_sample_pair, matrix
from fisherscope.analyses.interference.result import InterferenceResult

__all__ = [
    "BlockHeatmap",
    "InterferenceResult",
    "OverlapTest",
    "compute_heatmap",
    "compute_sample_pair",
    "interference",
    "interference_matrix",
    "matrix",
]
