"""What tells one function of the user's own from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_DEEPEST = 6
_MOST_ENTRIES = 1 << 20


def identity(function: Callable[..., Any]) -> str:
    """Name of a function, and a hash of what it does.

    That is its code and defaults, what it closes over, the object that it is a method of, and so on for the
    functions and objects found there. Models count by their type.
    """
    inner = function.func if isinstance(function, partial) else function
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    content = repr(_content(function, 0))
    return f"{name}#{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _content(value: Any, depth: int) -> Any:
    """Plain data that stands for a value; an address in memory identifies nothing."""
    if isinstance(value, str | bytes | int | float | complex | bool | None):
        return value
    if depth > _DEEPEST or isinstance(value, nn.Module | type):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, Tensor):
        entries = value.detach().cpu().double().flatten().tolist() if value.numel() <= _MOST_ENTRIES else ()
        return tuple(value.shape), hashlib.sha256(repr(entries).encode()).hexdigest()
    if isinstance(value, list | tuple | set | frozenset):
        items = [_content(item, depth + 1) for item in value]
        return tuple(sorted(items, key=repr) if isinstance(value, set | frozenset) else items)
    if isinstance(value, dict):
        return tuple((str(key), _content(item, depth + 1)) for key, item in value.items())
    return _of_object(value, depth + 1)


def _of_object(value: Any, depth: int) -> Any:
    if isinstance(value, partial):
        return _content((value.func, value.args, value.keywords), depth)
    if isinstance(value, MethodType):
        return _content((value.__func__, value.__self__), depth)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return _code(value.__code__), _content((value.__defaults__, value.__kwdefaults__, cells), depth)
    call = vars(type(value)).get("__call__")
    own = _content(call, depth) if isinstance(call, FunctionType) else None
    return type(value).__qualname__, own, _content(getattr(value, "__dict__", None), depth)


def _code(code: CodeType) -> tuple[Any, ...]:
    """What a function does, without where it is written; functions inside it included."""
    constants = tuple(_code(c) if isinstance(c, CodeType) else _content(c, 0) for c in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames
