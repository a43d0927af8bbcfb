"""Fields of JSON that may come from a stranger: each is what it may be, or a ValueError names it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")


def typed(data: dict[str, Any], key: str, kind: type[_T]) -> _T:
    """A field of one type.

    Raises:
        ValueError: it is missing or of another type.
    """
    value = data.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} is missing or no {kind.__name__}")  # noqa: TRY004 - damage, not misuse
    return value


def integer(data: dict[str, Any], key: str, largest: int) -> int:
    """A whole number from 0 to ``largest``.

    Raises:
        ValueError: it is missing or something else.
    """
    return bounded(data.get(key), key, largest)


def integers(data: dict[str, Any], key: str, largest: int) -> list[int]:
    """A list of whole numbers from 0 to ``largest``.

    Raises:
        ValueError: it is missing or something else.
    """
    values = typed(data, key, list)
    # not isinstance: True is no number here
    if not set(map(type, values)) <= {int} or (values and not 0 <= min(values) <= max(values) <= largest):
        raise ValueError(f"{key!r} holds something else than whole numbers from 0 to {largest}")
    return values


def bounded(value: Any, key: str, largest: int) -> int:
    """A whole number from 0 to ``largest``.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{key!r} is missing, or not a whole number from 0 to {largest}")
    return value


def matching(data: dict[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    """A text that matches a pattern as a whole.

    Raises:
        ValueError: it is missing or something else.
    """
    value = typed(data, key, str)
    if not pattern.fullmatch(value):
        raise ValueError(f"{key!r} has the wrong form: {value[:80]!r}")
    return value


def leaves(data: Any) -> Iterator[Any]:
    """Every key and every value that is no container in plain data."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield str(key)
            yield from leaves(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from leaves(value)
    else:
        yield data
