"""What tells one function of the user's own from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any


def identity(function: Callable[..., Any]) -> str:
    """Name of a function, and a hash of its code, defaults and plain values that it closes over."""
    inner = function.func if isinstance(function, partial) else function
    bound = (function.args, function.keywords) if isinstance(function, partial) else ()
    if not hasattr(inner, "__code__"):
        inner = type(inner).__call__ if hasattr(type(inner).__call__, "__code__") else inner
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    sha = hashlib.sha256(repr(_plain(bound)).encode())
    code = getattr(inner, "__code__", None)
    if code is not None:
        cells = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
        defaults = (getattr(inner, "__defaults__", None), getattr(inner, "__kwdefaults__", None))
        sha.update(repr((_code(code), _plain(defaults), _plain(cells))).encode())
    return f"{name}#{sha.hexdigest()[:16]}"


def _code(code: CodeType) -> tuple[Any, ...]:
    """What a function does, without where it is written; functions inside it included."""
    constants = tuple(_code(c) if isinstance(c, CodeType) else _plain(c) for c in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames


def _plain(value: Any) -> Any:
    """The value where it is plain data, else its type: an address in memory identifies nothing."""
    if isinstance(value, str | bytes | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    return type(value).__qualname__
