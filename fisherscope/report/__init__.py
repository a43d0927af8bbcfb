"""Results on a page: :func:`analyze` runs the analyses, :class:`Report` holds and saves what came of them."""

from fisherscope.report.csv_text import read_table
from fisherscope.report.figures import register_figures
from fisherscope.report.report import Report, analyze
from fisherscope.report.saving import check_target

__all__ = ["Report", "analyze", "check_target", "read_table", "register_figures"]
