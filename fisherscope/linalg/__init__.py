"""The algebra of per-sample gradients. Nothing here knows a model, a task or a file."""

from fisherscope.linalg.dense import Dense
from fisherscope.linalg.factored import Factored
from fisherscope.linalg.gradient import PerSampleGradient
from fisherscope.linalg.lazy import OneByOne
from fisherscope.linalg.low_rank import LowRank
from fisherscope.linalg.moments import Moments
from fisherscope.linalg.rows import Rows
from fisherscope.linalg.running import RunningSum
from fisherscope.linalg.total import Total, added

__all__ = [
    "Dense",
    "Factored",
    "LowRank",
    "Moments",
    "OneByOne",
    "PerSampleGradient",
    "Rows",
    "RunningSum",
    "Total",
    "added",
]
