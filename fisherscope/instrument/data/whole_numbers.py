"""Lists of whole numbers out of tensors, arrays and lists."""

from __future__ import annotations

import operator
from typing import Any

from fisherscope.instrument.data.place import Place


def dimensions(value: Any) -> int | None:
    """Number of axes of a tensor or array, 0 for a number, 1 or 2 for lists; None for anything else.

    A list of strings, dicts or tensors is no numeric value: None.
    """
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        return int(value.ndim)
    if isinstance(value, int):
        return 0
    if isinstance(value, list | tuple):
        if all(_is_number(item) for item in value):
            return 1
        if all(isinstance(item, list | tuple) and all(map(_is_number, item)) for item in value):
            return 2
    return None


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) or getattr(item, "ndim", None) == 0


def integers(value: Any, what: str, place: Place, *, truth: bool = False) -> list[int]:
    """The entries of a 1-D tensor, array or list of whole numbers.

    Args:
        value: what the row holds.
        what: its name.
        place: of the row.
        truth: whether True and False are numbers here, as in a mask.

    Raises:
        DataError: not one-dimensional, or not whole numbers.
    """
    axes = dimensions(value)
    if axes != 1:
        found = f"{axes}-dimensional" if axes is not None else f"a {type(value).__name__} of other things"
        raise place.error(f"{what} must be one list of whole numbers per sample, it is {found}")
    items = value.tolist() if hasattr(value, "tolist") else value
    if not truth and any(isinstance(item, bool) for item in items):
        raise place.error(f"{what} must be whole numbers, it holds True and False: is it a mask?")
    try:
        return [operator.index(item) for item in items]
    except TypeError:
        raise place.error(
            f"{what} must be whole numbers, it holds {_first_odd(items)!r}; give token ids as integers"
        ) from None


def _first_odd(items: Any) -> Any:
    for item in items:
        try:
            operator.index(item)
        except TypeError:
            return item
    return None
