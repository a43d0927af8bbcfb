"""In which units the sums of a snapshot are: of which array a power of two is the scale of which."""

from __future__ import annotations

from dataclasses import dataclass

from fisherscope.store.schema import StoreHeader

LOST = "lost"
"""``lost/NAME`` is what rounding took from the sum ``NAME``, bfloat16: their total is the sum."""

EXPONENTS = "exponents"
"""``exponents/LABELS``: one exponent for each instrumented parameter, int64."""

KRONECKER_EXPONENTS = "kronecker/exponents"
"""``kronecker/exponents/MODULE``: those of its A and its S, int64."""


@dataclass(frozen=True)
class Unit:
    """Where the exponent of a sum is.

    Attributes:
        name: of the array of exponents.
        place: in it.
        size: of it.
        power: how often the gradient is a factor of what is added up: 2 for squares.
    """

    name: str
    place: int
    size: int
    power: int


def unit_of(header: StoreHeader, name: str) -> Unit | None:
    """Where the exponent of an array of snapshots is; None for what has none."""
    head, _, rest = name.partition("/")
    if head == "kronecker":
        part, _, module = rest.partition("/")
        place = {"A": 0, "S": 1}.get(part)
        return None if place is None else Unit(f"{KRONECKER_EXPONENTS}/{module}", place, 2, 2)
    if head == "fisher":
        labels, _, parameter = rest.partition("/")
    elif head == "mean":
        labels, parameter = "data", rest
    else:
        return None
    if parameter not in header.parameters:
        return None
    place, size = header.parameters.index(parameter), len(header.parameters)
    return Unit(f"{EXPONENTS}/{labels}", place, size, 2 if head == "fisher" else 1)


def is_exponents(name: str) -> bool:
    """Whether an array of a snapshot holds exponents."""
    return name.startswith((f"{EXPONENTS}/", f"{KRONECKER_EXPONENTS}/"))


def is_whole(name: str) -> bool:
    """Whether an array of a snapshot holds whole numbers."""
    return is_exponents(name) or name.startswith("kronecker/positions/") or name.endswith("/count")
