"""What a function of the user's own does and refers to, by name, in texts that can be compared and read."""

from __future__ import annotations

import copyreg
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherscope.instrument.fingerprint import tensor_digest
from fisherscope.instrument.objectives.code import (
    Origin,
    code_of,
    function_in,
    members_of,
    names_in,
)

_MOST_VALUES = 20_000  # values that are looked into; what lies behind them counts by its type
_MOST_PARTS = 500
_MOST_ENTRIES = 64  # of a dict whose entries are parts of their own
_DEEPEST = 100
_LONGEST = 60  # characters of a value that is shown
_DICT = "()"  # stands for a dict itself, beside its entries
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# what a module of torch keeps for itself; parameters, buffers and submodules are looked at by name
_OF_MODULES = ("training", "_is_full_backward_hook", "_non_persistent_buffers_set", "_compiled_call_impl")
# what they will give is their state, wherever they were begun
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# fields of a config that say how and by what it was saved
_OF_CONFIGS = ("use_cache", "architectures", "dtype", "torch_dtype", "transformers_version")


def parts_of(function: Any) -> dict[str, str]:
    """What decides a function's results, by name.

    That is its code and defaults, what it closes over, the globals that it names, the object that it is a
    method of, and so on for the functions, classes and objects of the user's own found there. Objects of
    libraries count by what pickle would save of them, and by their type where it could not, as for an open
    file. An address in memory identifies nothing.

    Returns:
        Name, such as "TEMPERATURE" or "self.options.scale", -> the value where it is short, or a digest.
    """
    content = _Content(Origin.of(function))
    content.add("", function)
    return _at_most(content.parts, _MOST_PARTS)


def is_dict(path: str, parts: Mapping[str, str]) -> bool:
    """Whether a dict stands at a path."""
    return _join(path, _DICT) in parts


class _NoValueError(Exception):
    """Not even pickle can say what this object is."""


class _Content:
    """Walks values, each once."""

    def __init__(self, origin: Origin, *, strict: bool = False, depth: int = 0) -> None:
        self.parts: dict[str, str] = {}
        self._origin = origin
        self._strict = strict  # inside of a library's object
        self._depth = depth
        self._seen: dict[int, str] = {}
        self._kept: list[Any] = []  # ids are those of living objects

    def add(self, path: str, value: Any) -> None:
        """Note what stands at a path."""
        if value is None or _is_plain(value):
            self._note(path, repr(value))
        elif isinstance(value, np.generic):
            self._note(path, f"{value.dtype} {value.item()!r}")
        elif isinstance(value, torch.dtype | torch.device | torch.Size | range | slice | type(...)):
            self._note(path, repr(value))
        elif id(value) in self._seen:
            self._note(path, f"as {self._seen[id(value)] or 'itself'}")
        elif len(self._seen) >= _MOST_VALUES or self._depth > _DEEPEST:
            self._note(path, type(value).__qualname__)
        else:
            self._seen[id(value)] = path
            self._kept.append(value)
            self._depth += 1
            self._add_deep(path, value)
            self._depth -= 1

    def _add_deep(self, path: str, value: Any) -> None:
        kinds: tuple[tuple[Any, Callable[[str, Any], None]], ...] = (
            (Tensor, lambda p, v: self._note(p, f"tensor {tuple(v.shape)} {tensor_digest(v)[:16]}")),
            (np.ndarray, self._add_array),
            (list | tuple, lambda p, v: self._note(p, self._whole(type(v).__name__, enumerate(v)))),
            (set | frozenset, self._add_set),
            (Mapping, self._add_mapping),
            (FunctionType, self._add_function),
            (MethodType, self._add_method),
            (partial, self._add_partial),
            (type, self._add_class),
            (ModuleType | BuiltinFunctionType, lambda p, v: self._note(p, v.__name__)),
            (nn.Module, self._add_module),
            (object, self._add_object),
        )
        next(add(path, value) for kind, add in kinds if isinstance(value, kind))

    def _note(self, path: str, text: str) -> None:
        text = ascii(text)[1:-1] if not (text.isascii() and text.isprintable()) else text
        self.parts[path] = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}... {_digest(text)}"

    def _add_array(self, path: str, value: np.ndarray[Any, Any]) -> None:
        if value.dtype.hasobject:
            self._note(path, self._whole(f"array {value.shape}", enumerate(value.ravel().tolist())))
        else:
            raw = np.ascontiguousarray(value).tobytes()
            self._note(path, f"array {value.shape} {value.dtype} {hashlib.sha256(raw).hexdigest()[:16]}")

    def _add_set(self, path: str, value: Iterable[Any]) -> None:
        each = sorted(self._whole("", [("", item)]) for item in value)
        self._note(path, f"set {len(each)} {_digest(repr(each))}")

    def _add_mapping(self, path: str, value: Mapping[Any, Any]) -> None:
        self._note(_join(path, _DICT), type(value).__name__)
        self._add_named(path, {_key(key): value[key] for key in value})

    def _add_named(self, path: str, named: Mapping[str, Any]) -> None:
        """Parts with names, in an order that does not depend on how they came."""
        if len(named) > _MOST_ENTRIES:
            self._note(path, self._whole(f"{len(named)} entries", sorted(named.items())))
        else:
            for name in sorted(named):
                self.add(_join(path, name), named[name])

    def _whole(self, kind: str, named: Iterable[tuple[Any, Any]]) -> str:
        """Many values in one text."""
        inner = self._apart()
        for name, value in named:
            inner.add(str(name), value)
        texts = ", ".join(inner.parts.values())
        if len(texts) <= _LONGEST // 2 and all(name.isdecimal() for name in inner.parts):
            return f"{kind} [{texts}]"
        return f"{kind} {_digest(repr(sorted(inner.parts.items())))}"

    def _add_function(self, path: str, function: FunctionType) -> None:
        own = vars(function)
        if (compiled := own.get("_torchdynamo_orig_callable")) is not None:
            self.add(path, compiled)
            return
        if not self._origin.is_own(function.__module__):
            self._note(path, f"{function.__module__}.{function.__qualname__}")
            return
        self._note(_join(path, "code"), code_of(function))
        for number, value in enumerate(function.__defaults__ or ()):
            self.add(_join(path, f"default {number}"), value)
        self._add_named(path, function.__kwdefaults__ or {})
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.add(_join(path, name), cell.cell_contents)
            except ValueError:  # not filled yet
                self._note(_join(path, name), "not set")
        named = sorted(names_in(function))
        for name in named:
            if name in function.__globals__:
                self._add_global(_join(path, name), function.__globals__[name], named)
        self._add_named(path, {name: value for name, value in own.items() if name != "__wrapped__"})
        if "__wrapped__" in own:
            self.add(_join(path, "wrapped"), own["__wrapped__"])

    def _add_global(self, path: str, value: Any, named: list[str]) -> None:
        """What a global is; of a module of the user's own that which the code may mean by its names."""
        if not isinstance(value, ModuleType) or not self._origin.is_own(value.__name__):
            self.add(path, value)
        else:
            self._add_named(path, {name: vars(value)[name] for name in named if name in vars(value)})

    def _add_method(self, path: str, method: MethodType) -> None:
        self.add(_join(path, "method"), method.__func__)
        self.add(_join(path, "self"), method.__self__)

    def _add_partial(self, path: str, value: partial[Any]) -> None:
        self.add(path, value.func)
        for number, argument in enumerate(value.args):
            self.add(_join(path, f"argument {number}"), argument)
        self._add_named(path, value.keywords)

    def _add_class(self, path: str, cls: type) -> None:
        if not self._origin.is_own(cls.__module__):
            self._note(path, f"{cls.__module__}.{cls.__qualname__}")
            return
        for base in cls.__bases__:
            self.add(_join(path, base.__qualname__), base)
        members = members_of(cls)
        self._add_named(path, {name: function_in(value) or value for name, value in members.items()})

    def _add_module(self, path: str, module: nn.Module) -> None:
        if (inner := vars(module).get("_modules", {}).get("_orig_mod")) is not None:
            self.add(path, inner)  # what torch.compile made
            return
        self.add(_join(path, type(module).__qualname__), type(module))
        weights = [*module.named_parameters(), *module.named_buffers()]
        self._add_named(_join(path, "weights"), {name: value.detach() for name, value in weights})
        if hasattr(module, "config"):
            return  # a model: its attributes are the library's
        for name, part in module.named_modules():
            inner_path = _join(path, name) if name else path
            if name:
                self.add(_join(inner_path, type(part).__qualname__), type(part))
            self._add_named(inner_path, _attributes(part))

    def _add_object(self, path: str, value: Any) -> None:
        kind = type(value)
        if hasattr(value, "get_vocab"):
            self._note(path, f"{kind.__qualname__} {_digest(repr(sorted(value.get_vocab().items())))}")
        elif kind.__module__.partition(".")[0] == "transformers" and hasattr(value, "to_dict"):
            fields = {k: v for k, v in value.to_dict().items() if k not in _OF_CONFIGS and k[0] != "_"}
            self._note(path, self._whole(kind.__qualname__, sorted(fields.items())))
        elif isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):
            self.add(path, wrapped)  # such as what lru_cache makes: what it remembers is no part of it
        elif isinstance(value, _GENERATORS):
            self._note(path, kind.__qualname__)
        elif self._origin.is_own(kind.__module__):
            self.add(_join(path, kind.__qualname__), kind)
            self._add_named(path, _state(value))
        elif self._strict:
            self._note(path, self._pickled(value))
        else:
            self._note(path, self._of_library(value))

    def _of_library(self, value: Any) -> str:
        """A library's object is what pickle would save of it; where it would not, as of a lock, its type."""
        try:
            saved = self._pickled(value)
        except _NoValueError:
            return type(value).__qualname__
        words = repr(value) if _repr_of(type(value)) != _repr_of(object) else ""
        is_short = len(words) <= _LONGEST // 2 and words.isprintable() and not _ADDRESS.search(words)
        return f"{words if words and is_short else type(value).__qualname__} {_digest(saved)}"

    def _pickled(self, value: Any) -> str:
        try:
            own = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if own is None else own(value)
            if isinstance(reduced, str):
                return f"{type(value).__qualname__} {reduced}"
            made, state, items, entries = (*reduced, None, None, None, None)[1:5]
            saved = (reduced[0], made, state, list(items or ()), list(entries or ()))
        except Exception as error:
            raise _NoValueError from error
        inner = self._apart(strict=True)
        for number, each in enumerate(saved):
            inner.add(str(number), each)
        return f"{type(value).__qualname__} {_digest(repr(sorted(inner.parts.items())))}"

    def _apart(self, *, strict: bool = False) -> _Content:
        """Parts that become one: what was seen before is known there, and not the other way round."""
        inner = _Content(self._origin, strict=strict or self._strict, depth=self._depth)
        inner._seen, inner._kept = dict(self._seen), self._kept
        return inner


def _is_plain(value: Any) -> bool:
    return type(value) in {str, bytes, bool, int, float, complex}


def _key(key: Any) -> str:
    return key if type(key) is str else _ADDRESS.sub("", repr(key))


def _join(path: str, name: str) -> str:
    name = name if name.isascii() and name.isprintable() else ascii(name)
    name = name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}... {_digest(name)}"
    return f"{path}.{name}" if path else name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What the user has set on a module of torch."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _OF_MODULES
        and not key.endswith("_hooks")
        and "_hooks_" not in key
        and key not in {"_parameters", "_buffers", "_modules"}
    }


def _state(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots included."""
    state = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, slot) and slot not in {"__dict__", "__weakref__"}:
                state[slot] = getattr(value, slot)
    return state


def _repr_of(kind: type) -> Any:
    return kind.__repr__


def _at_most(parts: dict[str, str], most: int) -> dict[str, str]:
    """The same, where there are too many with the deepest taken together."""
    depth = max(path.count(".") for path in parts)
    while len(parts) > most and depth > 0:
        together: dict[str, list[str]] = {}
        for path, text in sorted(parts.items()):
            together.setdefault(".".join(path.split(".")[:depth]), []).append(f"{path}={text}")
        parts = {
            path: texts[0].partition("=")[2]
            if len(texts) == 1 and texts[0].startswith(f"{path}=")
            else _digest(repr(texts))
            for path, texts in together.items()
        }
        depth -= 1
    return parts
