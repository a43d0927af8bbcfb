"""Options as plain Python values, each of its type: results are the same whatever they came as."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def plain_fields(options: Any) -> None:
    """Turn numbers and truth values of numpy or torch in the fields of frozen options into Python's own.

    Tuples, lists and sets are looked into; anything else stays as it is.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if (plain := _plain(value)) is not value:
            object.__setattr__(options, field.name, plain)


def odd_field(options: Any) -> tuple[str, str] | None:
    """The first field whose value is not of its type, and what it must be; None where all are.

    Numbers, texts, None, choices and tuples of these are told apart; lists count as tuples.
    """
    for name, hint in get_type_hints(type(options)).items():
        if hasattr(options, name) and not _fits(getattr(options, name), hint):
            return name, " or ".join(dict.fromkeys(_words(hint)))
    return None


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(entry, args[0]) for entry in value)
    if hint in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if hint is int else int | float)
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _words(hint: Any) -> list[str]:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [word for one in args for word in _words(one)]
    if origin is tuple:
        return [f"a list of {_words(args[0])[0].removeprefix('a ')}s"]
    names = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}
    return [names.get(hint, "a text" if origin is Literal or hint is str else getattr(hint, "__name__", ""))]


def is_one_of(value: Any, allowed: Sequence[str]) -> bool:
    """Whether it is one of some words; an array is compared with nothing."""
    return isinstance(value, str) and value in allowed


def _plain(value: Any) -> Any:
    # np.float64 is a float and np.str_ a string, and both have an item()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "dtype") and hasattr(value, "item"):
        return value.item()
    if type(value) in (tuple, list) and any(_plain(entry) is not entry for entry in value):
        return type(value)(_plain(entry) for entry in value)
    return value
