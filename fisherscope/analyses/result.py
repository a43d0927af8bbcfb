"""What every analysis returns: tables, labelled arrays, and a summary in words."""

from __future__ import annotations

import dataclasses
import html
import math
from abc import ABC, abstractmethod
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from fisherscope.words import counted

SCHEMA_VERSION = 1
"""Version of the JSON form of results; it grows when a key changes its meaning."""

_HTML_ROWS = 10


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Result(ABC):
    """Data of one analysis. Figures are made elsewhere, from these fields.

    Attributes:
        name: key of the analysis.
        config: the options as used, plain values.
        frame: the main table, long form.
        data: arrays with labelled axes, or None.
        extra: further tables by name.
        details: further plain facts that belong into the JSON (the GQA map, say).
        warnings: what a reader must know before using the numbers.
    """

    name: str
    config: dict[str, Any]
    frame: pd.DataFrame
    data: xr.Dataset | None = None
    extra: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @abstractmethod
    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` rows that matter most."""

    @abstractmethod
    def summary(self) -> str:
        """What was found, in plain words with names and numbers."""

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by name, the main one under the analysis's own name."""
        return {self.name: self.frame, **{f"{self.name}_{key}": table for key, table in self.extra.items()}}

    def files(self) -> dict[str, str]:
        """Further text files by name, with their extension.

        A report writes them beside the tables, the name of the analysis before theirs.
        """
        return {}

    def to_json(self, *, max_rows: int | None = 20_000) -> dict[str, Any]:
        """Plain data for strict JSON: no NaN, no infinity (both become null).

        Args:
            max_rows: longer tables are cut, and their ``total`` tells how many rows there are; the CSV
                files hold all. None keeps every row.

        Returns:
            ``schema_version``, ``name``, ``config``, ``summary``, ``warnings``, ``details`` and ``tables``:
            per table ``columns``, ``rows`` and ``total``.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "config": strict(self.config),
            "summary": self.summary(),
            "warnings": list(self.warnings),
            "details": strict(self.details),
            "tables": {key: _table(frame, max_rows) for key, frame in self.tables().items()},
        }

    def __repr__(self) -> str:
        return f"<{self.name}: {counted(len(self.frame), 'row')}; {self.summary().splitlines()[0]}>"

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self.summary().splitlines())
        notes = "".join(f"<p><b>Warning:</b> {html.escape(note)}</p>" for note in self.warnings)
        table = self.top(_HTML_ROWS).to_html(index=False, escape=True, border=0)
        return f"<div><h4>{html.escape(self.name)}</h4>{lines}{notes}{table}</div>"


def strict(value: Any) -> Any:
    """Copy of nested plain data that ``json.dumps(..., allow_nan=False)`` accepts.

    Numpy and pandas scalars become Python values, tuples and arrays lists, NaN and infinities None.

    Raises:
        TypeError: a value has no JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range | np.ndarray | pd.Series):
        return [strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _table(frame: pd.DataFrame, max_rows: int | None) -> dict[str, Any]:
    shown = frame if max_rows is None else frame.head(max_rows)
    columns = [strict(shown[name].tolist()) for name in shown.columns]
    return {
        "columns": [str(name) for name in shown.columns],
        "rows": [list(row) for row in zip(*columns, strict=True)],
        "total": len(frame),
    }
