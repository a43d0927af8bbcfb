"""Rows in the forms of other libraries, as dicts: of pandas, named tuples, dataclasses, records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any


def plain_row(item: Any) -> Any:
    """The same row as a dict where its fields have names, otherwise as it is.

    A cell of a table that is missing (NaN, NaT, NA) is left out.
    """
    if isinstance(item, tuple) and len(item) == 2 and _is_series(item[1]):
        item = item[1]  # as frame.iterrows() yields them
    if _is_series(item):
        return _without_missing(item.to_dict()) if _has_names(item.index) else item
    if isinstance(item, tuple) and hasattr(item, "_asdict"):
        # the row's number, as frame.itertuples() has it, is no part of the sample
        return _without_missing({key: value for key, value in item._asdict().items() if key != "Index"})
    if dataclasses.is_dataclass(item) and not isinstance(item, type) and not isinstance(item, Mapping):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    names = getattr(getattr(item, "dtype", None), "names", None)
    if names and getattr(item, "ndim", None) == 0:
        return {name: item[name] for name in names}
    return item


def rows_of_frame(rows: Any) -> Iterable[Any] | None:
    """The rows of a table of pandas or polars as dicts; None where it is no table."""
    if hasattr(rows, "to_dicts") and hasattr(rows, "columns"):
        found: Iterable[Any] = rows.to_dicts()
        return found
    if hasattr(rows, "to_dict") and hasattr(rows, "columns") and hasattr(rows, "index"):
        return [_without_missing(row) for row in rows.to_dict("records")]
    return None


def _is_series(item: Any) -> bool:
    return (
        hasattr(item, "to_dict")
        and hasattr(item, "index")
        and not hasattr(item, "columns")
        and hasattr(item, "iloc")
    )


def _has_names(index: Any) -> bool:
    return len(index) > 0 and all(isinstance(name, str) for name in index)


def _without_missing(row: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in row.items() if not _is_missing(value)}


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in {"NAType", "NaTType"}:
        return True
    return isinstance(value, float) and math.isnan(value)
