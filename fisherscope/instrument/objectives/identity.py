"""What tells one function of the user's own from another."""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherscope.instrument.fingerprint import plain_text

_DEEPEST = 12
# what holds no value that a loss is made of, or one that changes with every use
_BY_TYPE = (logging.Logger, torch.Generator, np.random.Generator, np.random.RandomState)
_BY_TEXT = (Enum, torch.dtype, torch.device, torch.Size, np.dtype, range, slice, os.PathLike)


def identity(function: Callable[..., Any], model: nn.Module | None = None) -> str:
    """Name of a function, and a hash of what it does.

    That is its code and defaults, what it closes over, the globals that it names, the object that it is a
    method of with its class, and so on for the functions and objects found there: numbers, arrays, tensors,
    and the weights of modules. Libraries count by their names.

    Args:
        function: of the user's own.
        model: the model whose loss it is, which has an identity of its own.
    """
    inner = function.func if isinstance(function, partial) else function
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    content = repr(_Content(model).of(function, 0))
    return f"{name}#{hashlib.sha256(content.encode(errors='replace')).hexdigest()[:16]}"


class _Content:
    """Plain data that stands for values; an address in memory identifies nothing."""

    def __init__(self, model: nn.Module | None) -> None:
        modules = [] if model is None else list(model.modules())
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        self._known = {id(value) for value in (*modules, *tensors)}
        self._open: set[int] = set()

    def of(self, value: Any, depth: int) -> Any:
        """Plain data for one value."""
        if isinstance(value, str | bytes | int | float | complex | bool | None) and not isinstance(
            value, Enum
        ):
            return value
        if isinstance(value, np.ndarray | np.generic):
            return _of_array(np.asarray(value))
        is_met = id(value) in self._known or id(value) in self._open
        if is_met or depth > _DEEPEST or isinstance(value, _BY_TYPE):
            return type(value).__qualname__
        if isinstance(value, _BY_TEXT):
            return type(value).__qualname__, str(value)
        self._open.add(id(value))
        try:
            return self._of_container(value, depth + 1)
        finally:
            self._open.discard(id(value))

    def _of_container(self, value: Any, depth: int) -> Any:  # noqa: PLR0911 - one line for each kind
        if isinstance(value, Tensor):
            return plain_text(value)
        if isinstance(value, set | frozenset):
            return sorted((self.of(item, depth) for item in value), key=repr)
        if isinstance(value, list | tuple):
            return [self.of(item, depth) for item in value]
        if isinstance(value, Mapping):
            return [(self.of(key, depth), self.of(item, depth)) for key, item in value.items()]
        if isinstance(value, partial):
            return [self.of(part, depth) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, MethodType):
            return [self.of(part, depth) for part in (value.__func__, value.__self__)]
        if isinstance(value, FunctionType):
            return self._of_function(value, depth)
        if isinstance(value, type):
            return value.__qualname__, self._of_class(value, depth)
        if isinstance(value, ModuleType | BuiltinFunctionType):
            return value.__name__
        if (wrapped := getattr(value, "__wrapped__", None)) is not None:
            return self.of(wrapped, depth)  # a cache of results is none of its value
        return self._of_object(value, depth)

    def _of_function(self, function: FunctionType, depth: int) -> Any:
        if _is_of_a_library(function):
            return function.__module__, function.__qualname__
        cells = [_cell(cell) for cell in function.__closure__ or ()]
        given = (function.__defaults__, function.__kwdefaults__, cells)
        names = sorted(set(_names(function.__code__)))
        used = [
            (name, self._of_global(function.__globals__[name], names, depth))
            for name in names
            if name in function.__globals__
        ]
        return _code(function.__code__, function.__doc__), [self.of(part, depth) for part in given], used

    def _of_global(self, value: Any, names: list[str], depth: int) -> Any:
        """A global that a function names; of a module of the user's own, what the function may take of it."""
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            taken = [name for name in names if name in vars(value)]
            return value.__name__, [(name, self.of(vars(value)[name], depth)) for name in taken]
        return self.of(value, depth)

    def _of_class(self, cls: type, depth: int) -> Any:
        """The code and the plain values of a class of the user's own, and of those that it derives from."""
        own = [base for base in cls.__mro__ if not _is_library(base.__module__)]
        return [
            (base.__qualname__, name, self.of(_function(member), depth))
            for base in own
            for name, member in sorted(vars(base).items())
            if not name.startswith("__") or name in {"__call__", "__init__"}
        ]

    def _of_object(self, value: Any, depth: int) -> Any:
        held = [self._of_class(type(value), depth)]
        if isinstance(value, nn.Module):
            held.append([(name, self.of(t, depth)) for name, t in value.named_parameters()])
            held.append([(name, self.of(t, depth)) for name, t in value.named_buffers()])
            for name, module in value.named_modules():
                if id(module) not in self._known:
                    held.append((name, self._of_class(type(module), depth), self._attributes(module, depth)))
        else:
            held.append(self._attributes(value, depth))
        return type(value).__qualname__, held

    def _attributes(self, value: Any, depth: int) -> Any:
        """What an object holds by name: of a library's, and of a module, only what is not private."""
        closed = isinstance(value, nn.Module) or _is_library(type(value).__module__)
        found = dict(getattr(value, "__dict__", {}))
        for base in type(value).__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    found[name] = getattr(value, name)
        kept = {k: v for k, v in found.items() if not (closed and (k.startswith("_") or k == "training"))}
        return [(name, self.of(item, depth)) for name, item in sorted(kept.items())]


def _of_array(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.hasobject:
        return array.shape, [str(item) for item in array.ravel()]
    return array.shape, str(array.dtype), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _function(member: Any) -> Any:
    """The function behind what stands in a class."""
    if isinstance(member, property):
        return [part for part in (member.fget, member.fset) if part is not None]
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code(code: CodeType, doc: str | None = None) -> tuple[Any, ...]:
    """What a function does, without where it is written and what is said of it; inner functions included."""
    plain = [constant for constant in code.co_consts if constant is not doc or doc is None]
    constants = tuple(_code(c) if isinstance(c, CodeType) else repr(c) for c in plain)
    return code.co_code, constants, code.co_names, code.co_varnames


def _names(code: CodeType) -> Iterator[str]:
    """Every name that a function or one inside it looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_of_a_library(function: FunctionType) -> bool:
    return _is_library(str(function.__module__))


@cache
def _is_library(module: str) -> bool:
    """Whether a module was installed, and so is known by its name."""
    import sys

    if module in {"builtins", "__main__", "None", ""}:
        return module == "builtins"
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)
    if found is None or file is None:
        return found is not None and module.partition(".")[0] in sys.stdlib_module_names
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(Path(file).is_relative_to(root) for root in roots if root) or module.startswith("fisherscope.")
