"""Tables as CSV that a spreadsheet shows and does not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

# A spreadsheet takes a cell that begins so for a formula; the apostrophe is what marks a text there.
_BEGINNINGS = ("=", "+", "-", "@", "\t", "\r", "'")


def csv_of(frame: pd.DataFrame) -> str:
    """A table as CSV.

    Texts and names of columns that begin with ``= + - @``, a tab, a carriage return or an apostrophe get an
    apostrophe in front. Numbers stay as they are. :func:`read_table` takes the apostrophes away again.
    """
    safe = frame.copy()
    for number, kind in enumerate(safe.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            safe.isetitem(number, [_marked(value) for value in safe.iloc[:, number]])
    safe.columns = pd.Index([_marked(name) for name in safe.columns])
    text = safe.to_csv(index=False)
    # a lone carriage return is only quoted, and so no end of a row, where it is part of the rows' own ends
    return safe.to_csv(index=False, lineterminator="\r\n") if "\r" in text else text


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table of a report, with its texts as they were before they were marked for spreadsheets.

    Args:
        path: a CSV file under ``tables/``.

    Returns:
        Its columns and rows; an empty cell is NaN, and no text ("NA", "null") is taken for one.

    Raises:
        OSError: the file cannot be read.
    """
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    for number, kind in enumerate(frame.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            frame.isetitem(number, [_unmarked(value) for value in frame.iloc[:, number]])
    frame.columns = pd.Index([_unmarked(name) for name in frame.columns])
    return frame


def _marked(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_BEGINNINGS) else value


def _unmarked(value: Any) -> Any:
    return value.removeprefix("'") if isinstance(value, str) else value
