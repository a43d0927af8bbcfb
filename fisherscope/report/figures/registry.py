"""Which function draws which result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fisherscope.analyses import Result
from fisherscope.errors import UsageError
from fisherscope.report.figures.parts import PlotlyDict


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        title: what it shows, in plain words.
        plot: ``data`` and ``layout`` as plotly's JSON has them.
        caption: how to read it.
        wide: takes the whole width of the page.
    """

    title: str
    plot: PlotlyDict
    caption: str = ""
    wide: bool = False


Draw = Callable[[Any], list[Figure]]
D = TypeVar("D", bound=Draw)

_DRAWERS: dict[type[Result], Draw] = {}


def register_figures(result_type: type[Result]) -> Callable[[D], D]:
    """Decorator: the function makes the figures of results of this type and its subclasses.

    Returns:
        The decorator; the function is ``result -> list[Figure]``.

    Raises:
        ValueError: the type has figures already.
    """
    if result_type in _DRAWERS:
        raise UsageError(f"figures of {result_type.__name__} are already registered")

    def add(function: D) -> D:
        _DRAWERS[result_type] = function
        return function

    return add


def figures_of(result: Result) -> list[Figure]:
    """Figures of a result; none where its type has no registered function."""
    for kind in type(result).__mro__:
        if kind in _DRAWERS:
            return _DRAWERS[kind](result)
    return []
