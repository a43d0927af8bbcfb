"""Ticks of logarithmic colour bars."""

from __future__ import annotations

import math


def log_ticks(low: float, high: float, most: int = 6) -> tuple[list[float], list[str]]:
    """Ticks between two positive numbers, for colours that stand for their decimal logarithm.

    Args:
        low: the smallest value, above 0.
        high: the largest value.
        most: so many ticks at most, roughly.

    Returns:
        Positions (logarithms) and texts.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / most))
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        values = [m * 10.0**e for e in range(first, last + 1, step) for m in mantissas]
        inside = [v for v in values if low * 0.999 <= v <= high * 1.001]
        if len(inside) >= 3:
            break
    else:
        inside = [low, math.sqrt(low * high), high] if high > low else [low]
    return [math.log10(v) for v in inside], [f"{v:.2g}" for v in inside]
