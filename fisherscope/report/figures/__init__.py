"""Figures by result type: pure functions from a result to plain plotly dictionaries."""

from fisherscope.report.figures import conflict, fisher, importance, interference, masks, overlap  # noqa: F401
from fisherscope.report.figures.registry import Figure, figures_of, register_figures

__all__ = ["Figure", "figures_of", "register_figures"]
