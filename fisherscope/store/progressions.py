"""Sets of batch numbers as arithmetic progressions: what a rank has done is a few of them, however much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Progression: TypeAlias = tuple[int, int, int]  # start, count, step


def pack(numbers: Iterable[int]) -> tuple[Progression, ...]:
    """Write a set of whole numbers as progressions that do not overlap, in order of their starts."""
    rest = sorted(set(numbers))
    packed: list[Progression] = []
    first = 0
    while first < len(rest):
        step = rest[first + 1] - rest[first] if first + 1 < len(rest) else 1
        last = first
        while last + 1 < len(rest) and rest[last + 1] - rest[last] == step:
            last += 1
        # two numbers apart are no progression yet: the second may begin one
        if last == first + 1 and step > 1 and last + 1 < len(rest):
            last, step = first, 1
        packed.append((rest[first], last - first + 1, step))
        first = last + 1
    return tuple(packed)


def size(packed: Iterable[Progression]) -> int:
    """How many numbers there are."""
    return sum(count for _, count, _ in packed)


def unpack(packed: Iterable[Progression]) -> NDArray[np.int64]:
    """The numbers, in the order of the progressions; check :func:`size` of what a stranger wrote first."""
    pieces = [start + step * np.arange(count, dtype=np.int64) for start, count, step in packed]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
