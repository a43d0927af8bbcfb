"""Whose code a function or class is, and what the code of a function does."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

_LIBRARIES = tuple(
    str(Path(path).resolve()) for path in {sysconfig.get_path(k) for k in ("stdlib", "purelib", "platlib")}
)
# attributes of a class that Python makes
_OF_CLASSES = ("__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__")


@dataclass(frozen=True)
class Origin:
    """Tells the user's own code from libraries'.

    Attributes:
        package: that of the function in question, which counts as the user's own wherever it is installed.
    """

    package: str

    @classmethod
    def of(cls, function: Any) -> Origin:
        """That of a function, or of an object that can be called."""
        module = getattr(function, "__module__", None) or type(function).__module__
        return cls(str(module).partition(".")[0])

    def is_own(self, name: str | None) -> bool:
        """Whether a module is neither Python's nor that of an installed package other than this one."""
        module = sys.modules.get(name or "")
        top = (name or "").partition(".")[0]
        if top == "fisherscope" or top in sys.stdlib_module_names - {"__main__"}:
            return False
        if module is None or top in {"__main__", self.package}:
            return True
        file = getattr(module, "__file__", None)
        return file is None or not str(Path(file).resolve()).startswith(_LIBRARIES)


def code_of(function: FunctionType) -> str:
    """What a function does, without where it is written and what is said of it.

    Instructions are those of one minor version of Python, which stands beside the digest.
    """
    what = repr(_instructions(function.__code__, function.__doc__))
    version = ".".join(map(str, sys.version_info[:2]))
    return f"{hashlib.sha256(what.encode()).hexdigest()[:16]} of Python {version}"


def names_in(function: FunctionType) -> set[str]:
    """Names of globals and attributes in the code of a function and of those within it."""
    return {name for inner in _codes(function.__code__) for name in inner.co_names}


def members_of(cls: type) -> dict[str, Any]:
    """What the body of a class defines."""
    return {k: v for k, v in vars(cls).items() if k not in _OF_CLASSES and not _is_descriptor(v)}


def function_in(member: Any) -> FunctionType | None:
    """The function in a member of a class, also of a property or class method."""
    for name in ("__func__", "fget", "func"):
        member = getattr(member, name, member)
    return member if isinstance(member, FunctionType) else None


def _is_descriptor(value: Any) -> bool:
    return type(value).__name__ in {"getset_descriptor", "member_descriptor", "wrapper_descriptor"}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _instructions(code: CodeType, doc: str | None = None) -> tuple[Any, ...]:
    constants = [
        _instructions(c) if isinstance(c, CodeType) else _constant(c)
        for c in code.co_consts
        if not (doc is not None and c == doc)
    ]
    return code.co_code, constants, code.co_names, code.co_varnames


def _constant(value: Any) -> Any:
    if isinstance(value, frozenset):
        return "set", sorted(map(repr, value))
    return repr(value)
