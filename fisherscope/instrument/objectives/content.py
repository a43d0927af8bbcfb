"""Plain data that stands for what a function of the user's own does and refers to."""

from __future__ import annotations

import dis
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherscope.instrument.fingerprint import tensor_digest

_MOST = 20_000  # values that are looked into; what lies behind them counts by its type
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LIBRARIES = tuple(
    str(Path(path).resolve()) for path in {sysconfig.get_path(k) for k in ("stdlib", "purelib", "platlib")}
)
# what a module of torch keeps for itself; parameters, buffers and submodules are looked at by name
_OF_MODULES = ("training", "_is_full_backward_hook", "_non_persistent_buffers_set", "_compiled_call_impl")
# fields of a config that say how and by what it was saved
_OF_CONFIGS = ("use_cache", "architectures", "dtype", "torch_dtype", "transformers_version")
# attributes of a class that Python makes
_OF_CLASSES = ("__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__")
# what these write is what an object is begun with
_SETTING_UP = ("__init__", "__post_init__", "__new__", "__setattr__", "__setstate__")
_WRITES = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "STORE_ATTR"}


class Content:
    """Walks values, each once; an address in memory identifies nothing."""

    def __init__(self, root: Any) -> None:
        """The package of the root counts as the user's own, wherever it is installed."""
        self._package = str(getattr(root, "__module__", None) or type(root).__module__).partition(".")[0]
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # ids are those of living objects
        self._written: set[str] = set()

    def of(self, value: Any) -> Any:
        """Plain data for a value."""
        if value is None or _is_plain(value):
            return repr(value) if isinstance(value, float | complex) else value
        if isinstance(value, np.generic):
            return str(value.dtype), repr(value.item())
        if isinstance(value, torch.dtype | torch.device | torch.Size | range | slice | type(...)):
            return repr(value)
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        if len(self._seen) >= _MOST:
            return type(value).__qualname__
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return self._deep(value)

    def _deep(self, value: Any) -> Any:
        kinds: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
            (Tensor, lambda v: ("tensor", tensor_digest(v))),
            (np.ndarray, self._array),
            (list | tuple, lambda v: (type(v).__name__, [self.of(item) for item in v])),
            # what was seen would depend on the order, which is another in each process
            (set | frozenset, lambda v: ("set", sorted(repr(self._apart().of(item)) for item in v))),
            (Mapping, lambda v: (type(v).__name__, self._mapping(v))),
            (FunctionType, self._function),
            (MethodType, lambda v: (self.of(v.__func__), self.of(v.__self__))),
            (partial, lambda v: ("partial", self.of(v.func), self.of(v.args), self.of(v.keywords))),
            (type, self._class),
            (ModuleType | BuiltinFunctionType, lambda v: v.__name__),
            (nn.Module, self._module),
            (object, self._object),
        )
        return next(make(value) for kind, make in kinds if isinstance(value, kind))

    def _array(self, value: np.ndarray[Any, Any]) -> Any:
        if value.dtype.hasobject:
            return "array", value.shape, [self.of(item) for item in value.ravel().tolist()]
        raw = np.ascontiguousarray(value).tobytes()
        return "array", value.shape, str(value.dtype), hashlib.sha256(raw).hexdigest()

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        items = [(key, value[key]) for key in value if str(key) not in self._written]
        return [(_key(key), self.of(item)) for key, item in sorted(items, key=lambda item: _key(item[0]))]

    def _function(self, function: FunctionType) -> Any:
        if not self._is_own(function):
            return f"{function.__module__}.{function.__qualname__}"
        code = function.__code__
        self._written.update(_written(function))
        cells = {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name not in self._written:
                try:
                    cells[name] = self.of(cell.cell_contents)
                except ValueError:  # not filled yet
                    cells[name] = None
        named = [name for name in sorted(_names(code)) if name not in self._written]
        found = {name: function.__globals__[name] for name in named if name in function.__globals__}
        return (
            _code(code, function.__doc__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            sorted(cells.items()),
            [(name, self._global(value, named)) for name, value in found.items()],
            self._mapping({k: v for k, v in vars(function).items() if k != "__wrapped__"}),
            self.of(getattr(function, "__wrapped__", None)),
        )

    def _global(self, value: Any, named: list[str]) -> Any:
        """What a global is; of a module of the user's own that which the code may mean by its names."""
        if not isinstance(value, ModuleType) or _is_library(value, self._package):
            return self.of(value)
        return value.__name__, [(n, self.of(vars(value)[n])) for n in named if n in vars(value)]

    def _class(self, cls: type) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if _is_library(sys.modules.get(cls.__module__), self._package):
            return name
        own = {k: v for k, v in vars(cls).items() if k not in _OF_CLASSES and not _is_descriptor(v)}
        for value in own.values():
            if (inner := _function_in(value)) is not None:
                self._written.update(_written(inner))
        bases = [self.of(base) for base in cls.__bases__]
        members = [
            (k, self.of(_function_in(v) or v)) for k, v in sorted(own.items()) if k not in self._written
        ]
        return cls.__qualname__, bases, members

    def _module(self, module: nn.Module) -> Any:
        kind = self.of(type(module))
        weights = [
            (name, self.of(value))
            for name, value in [*module.named_parameters(), *module.named_buffers()]
            if name.rpartition(".")[2] not in self._written
        ]
        if hasattr(module, "config"):
            return kind, weights  # a model: its attributes are the library's
        parts = []
        for path, part in module.named_modules():
            inner = self.of(type(part))
            kept = {
                key: value
                for key, value in vars(part).items()
                if key not in _OF_MODULES
                and not key.endswith("_hooks")
                and "_hooks_" not in key
                and key not in {"_parameters", "_buffers", "_modules"}
            }
            parts.append((path, inner, self._mapping(kept)))
        return kind, weights, parts

    def _object(self, value: Any) -> Any:
        kind = self.of(type(value))
        module = type(value).__module__.partition(".")[0]
        if hasattr(value, "get_vocab"):
            return kind, hashlib.sha256(repr(sorted(value.get_vocab().items())).encode()).hexdigest()
        if module == "transformers" and hasattr(value, "to_dict"):
            fields = value.to_dict()
            return kind, self._mapping(
                {k: v for k, v in fields.items() if k not in _OF_CONFIGS and k[0] != "_"}
            )
        wrapped = getattr(value, "__wrapped__", None)
        if isinstance(wrapped, FunctionType):
            return kind, self.of(wrapped)  # such as what lru_cache makes: what it remembers is no part of it
        library = module in sys.stdlib_module_names and not isinstance(value, SimpleNamespace)
        if library and module not in {"argparse", "types", "dataclasses"}:
            return kind, _words(value)
        state = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, slot) and slot not in {"__dict__", "__weakref__"}:
                    state[slot] = getattr(value, slot)
        has_state = bool(state) or hasattr(value, "__dict__")
        return (kind, self._mapping(state)) if has_state else (kind, _words(value))

    def _is_own(self, function: FunctionType) -> bool:
        return not _is_library(sys.modules.get(function.__module__ or ""), self._package)

    def _apart(self) -> Content:
        other = Content(None)
        other._package, other._seen, other._written = self._package, dict(self._seen), self._written
        other._kept = self._kept
        return other


def _is_plain(value: Any) -> bool:
    return type(value) in {str, bytes, bool, int, float, complex}


def _key(key: Any) -> str:
    return repr(key) if key is None or _is_plain(key) else _ADDRESS.sub("", str(key))


def _words(value: Any) -> Any:
    """How a value of a library's type reads, where that tells what it is."""
    words = repr(value) if _repr_of(type(value)) != _repr_of(object) else ""
    if _ADDRESS.search(words) or type(value).__module__.partition(".")[0] in {
        "logging",
        "threading",
        "random",
    }:
        return None
    return words


def _repr_of(kind: type) -> Any:
    return kind.__repr__


def _is_library(module: ModuleType | None, package: str) -> bool:
    """Whether a module comes from Python or an installed package other than this one."""
    name = getattr(module, "__name__", "")
    top = name.partition(".")[0]
    if module is None or top in {"__main__", package}:
        return False
    if top == "fisherscope" or top in sys.stdlib_module_names:
        return True
    file = getattr(module, "__file__", None)
    return file is not None and str(Path(file).resolve()).startswith(_LIBRARIES)


def _is_descriptor(value: Any) -> bool:
    return type(value).__name__ in {"getset_descriptor", "member_descriptor", "wrapper_descriptor"}


def _function_in(value: Any) -> FunctionType | None:
    """The function in a member of a class."""
    inner = getattr(value, "__func__", getattr(value, "fget", value))
    return inner if isinstance(inner, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType) -> set[str]:
    return {name for inner in _codes(code) for name in inner.co_names}


def _written(function: FunctionType) -> set[str]:
    """Names of globals, outer variables and attributes that a function writes; none where it sets up."""
    found: set[str] = set()
    code = function.__code__
    if function.__name__ in _SETTING_UP:
        return found
    for inner in _codes(code):
        outer = set(inner.co_freevars)
        for step in dis.get_instructions(inner):
            is_cell = step.opname == "STORE_DEREF"
            if step.opname in _WRITES and (not is_cell or step.argval in outer):
                found.add(str(step.argval))
    return found - set(code.co_cellvars)


def _code(code: CodeType, doc: str | None = None) -> tuple[Any, ...]:
    """What a function does, without where it is written and what is said of it."""
    constants = [
        _code(c) if isinstance(c, CodeType) else _constant(c)
        for c in code.co_consts
        if not (doc is not None and c == doc)
    ]
    return code.co_code, constants, code.co_names, code.co_varnames


def _constant(value: Any) -> Any:
    if isinstance(value, frozenset):
        return "set", sorted(map(repr, value))
    return repr(value)
