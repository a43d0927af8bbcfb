"""Powers of two that keep squares within the range of float32.

The square of a gradient of 1e-20 is 1e-40, of which float32 holds little, and that of 1e-23 is nothing at
all; the square of 1e20 is infinite. A power of two changes no digit of a gradient, so gradients are
multiplied by one before they are squared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 120
"""The largest exponent in use: with it, any float32 comes into the range, and it is a float32 itself."""

_LOWEST, _HIGHEST = -16, 40  # of gradients that are left as they are
_SURE = 2.0**-40, 2.0**100  # squared norms between which those of parts of a gradient are exact, too


def exponent_of(largest: float) -> int:
    """The exponent k with which gradients are to be multiplied by ``2 ** k``.

    Args:
        largest: the largest absolute value of an entry, or a bound of it.

    Returns:
        0 for what can well be squared as it is, and where nothing is known (0, infinite, NaN).
    """
    if not math.isfinite(largest) or largest <= 0:
        return 0
    exponent = math.frexp(largest)[1]
    return max(-LIMIT, min(LIMIT, min(max(exponent, _LOWEST), _HIGHEST) - exponent))


def is_in_range(square: float) -> bool:
    """Whether a gradient of this squared norm can be squared as it is, with room for others."""
    return 4.0**_LOWEST <= square <= 4.0**_HIGHEST


def are_sure(squares: Tensor) -> bool:
    """Whether no squared norm can have lost digits to the range of float32."""
    if not squares.numel():
        return True
    low, high = torch.aminmax(squares)
    return bool(low >= _SURE[0]) and bool(high <= _SURE[1])


def doubtful(squares: Tensor) -> Tensor:
    """Which of some squared norms may have lost digits to the range of float32: also 0, infinity and NaN."""
    low, high = _SURE
    return ~((squares >= low) & (squares <= high))


def unscaled(values: Tensor, exponent: int) -> Tensor:
    """``values / 2 ** exponent`` in float64, where that exists."""
    wide = values.cpu().double() if values.device.type == "mps" else values.double()
    return wide * 2.0**-exponent if exponent else wide


def as_float32(values: Tensor) -> Tensor:
    """Float64 values as float32 where it holds every one of them, else as they are.

    Below 1.2e-38 float32 has fewer digits or none, and nothing above 3.4e38.
    """
    narrow = torch.finfo(torch.float32)
    size = values.abs()
    held = (size >= narrow.tiny) & (size <= narrow.max)
    return values.float() if bool((held | (size == 0) | ~torch.isfinite(values)).all()) else values
