"""Ticks of logarithmic colour bars and axes."""

from __future__ import annotations

import math


def log_ticks(low: float, high: float, most: int = 6) -> tuple[list[float], list[str]]:
    """Ticks between two positive numbers, for colours that stand for their decimal logarithm.

    Args:
        low: the smallest value, above 0.
        high: the largest value.
        most: so many ticks at most, roughly.

    Returns:
        Positions (logarithms) and texts, no two alike.
    """
    values = _between(low, high, most)
    return [math.log10(value) for value in values], _texts(values)


def share_ticks(low: float, high: float) -> dict[str, object]:
    """Keys of a logarithmic axis of shares: ticks in percent, no two alike.

    Args:
        low: the smallest share, above 0.
        high: the largest.
    """
    values = _between(low, high, 6)
    return {"tickvals": values, "ticktext": [f"{text}%" for text in _texts([100 * v for v in values])]}


def _between(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / most))
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        values = [m * 10.0**e for e in range(first, last + 1, step) for m in mantissas]
        inside = [v for v in values if low * 0.999 <= v <= high * 1.001]
        if len(inside) >= 3:
            break
    else:
        inside = [low, math.sqrt(low) * math.sqrt(high), high] if high > low else [low]
    return inside


def _texts(values: list[float]) -> list[str]:
    """As few digits as tell the values apart."""
    texts: list[str] = []
    for digits in range(2, 18):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts
