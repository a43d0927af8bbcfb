"""Results on a page: :func:`analyze` runs the analyses, :class:`Report` holds and saves what came of them."""

from fisherscope.report.figures import register_figures
from fisherscope.report.report import Report, analyze

__all__ = ["Report", "analyze", "register_figures"]
