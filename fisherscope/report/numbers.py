"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

NOTHING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def short(value: Any) -> str:
    """Three significant digits, or all of an integer: ``1,234``, ``0.0123``, ``1.23e-6``."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", _MINUS)
    number = float(value)
    if math.isinf(number):
        return f"{_MINUS if number < 0 else ''}\N{INFINITY}"
    if (number.is_integer() or abs(number) >= 1000) and abs(number) < 1e5:
        text = f"{number:,.0f}"
    elif 1e-3 <= abs(number) < 1e5:
        text = f"{number:#.3g}".rstrip(".")
    else:
        mantissa, _, exponent = f"{number:.2e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", _MINUS)


def signed(value: Any) -> str:
    """Three decimals with a sign, as cosines are written."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return NOTHING
    return f"{float(value):+.3f}".replace("-", _MINUS)


def p_value(value: Any) -> str:
    """A p-value; where it is too small to matter, only how small."""
    return "< 1e\N{MINUS SIGN}99" if value is not None and value < 1e-99 else short(value)


def percent(value: Any) -> str:
    """A share as a percentage with one decimal."""
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return NOTHING
    return f"{float(value):.1%}".replace("-", _MINUS)


def size(count: int) -> str:
    """Bytes in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
