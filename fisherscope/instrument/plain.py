"""Options as plain Python values: JSON and a run's identity are the same whatever they came as."""

from __future__ import annotations

import dataclasses
from typing import Any


def plain_fields(options: Any) -> None:
    """Turn numbers and truth values of numpy or torch in the fields of frozen options into Python's own.

    Tuples, lists and sets are looked into; anything else stays as it is.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if (plain := _plain(value)) is not value:
            object.__setattr__(options, field.name, plain)


def _plain(value: Any) -> Any:
    # np.float64 is a float and np.str_ a string, and both have an item()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "dtype") and hasattr(value, "item"):
        return value.item()
    if type(value) in (tuple, list) and any(_plain(entry) is not entry for entry in value):
        return type(value)(_plain(entry) for entry in value)
    return value
