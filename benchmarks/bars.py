"""Ratios with the bar that the project sets itself, and whether they are on the right side of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        ratio, low, high: median and quartiles over the repetitions.
        bar: what the median should be, in words; empty where there is none.
        ok: whether it is.
    """

    setting: str
    variant: str
    ratio: float
    low: float
    high: float
    bar: str
    ok: bool


def row(setting: str, variant: str, values: Sequence[float], *, least: float = 0.0, most: float = 0.0) -> Row:
    """A row of ratios, one per repetition; 0 stands for no bar."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    bar = f"at least {least:g}" if least else f"at most {most:g}" if most else ""
    return Row(setting, variant, middle, low, high, bar, middle >= least and (not most or middle <= most))


def show(rows: Sequence[Row]) -> None:
    """Print what was measured together."""
    last = ""
    for one in rows:
        if one.setting != last:
            print(f"\n{one.setting}")
            print(f"  {'':<40} median  (quartiles)      bar")
        last = one.setting
        spread = f"({one.low:.2f}-{one.high:.2f})"
        print(f"  {one.variant:<40} {one.ratio:6.2f}  {spread:<15}  {one.bar}{'' if one.ok else '  MISSED'}")
