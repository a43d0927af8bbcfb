"""Extensions: which quantities are emitted. One file per quantity."""

from fisherscope.instrument.extensions.base import Collector, Extension
from fisherscope.instrument.extensions.exact_per_token import ExactPerToken
from fisherscope.instrument.extensions.fisher import Fisher
from fisherscope.instrument.extensions.kronecker import Kronecker
from fisherscope.instrument.extensions.positions import Positions
from fisherscope.instrument.extensions.registry import register_extension, resolve_extensions
from fisherscope.instrument.extensions.sample_gradients import SampleGradients

__all__ = [
    "Collector",
    "ExactPerToken",
    "Extension",
    "Fisher",
    "Kronecker",
    "Positions",
    "SampleGradients",
    "register_extension",
    "resolve_extensions",
]
