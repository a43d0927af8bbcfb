"""Where samples of one task stress the attention slices that another task's samples move."""

from fisherscope.analyses.interference.analysis import interference
from fisherscope.analyses.interference.form import interference_matrix
from fisherscope.analyses.interference.query import matrix, sample_pair
from fisherscope.analyses.interference.result import InterferenceResult

__all__ = ["InterferenceResult", "interference", "interference_matrix", "matrix", "sample_pair"]
