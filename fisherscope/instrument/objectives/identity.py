"""What tells one function of the user's own from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

from fisherscope.instrument.objectives.content import Content


def identity(function: Callable[..., Any]) -> str:
    """Name of a function, and a hash of what it does.

    That is its code and defaults, what it closes over, the globals that it names, the object that it is a
    method of, and so on for the functions, classes and objects of the user's own found there. What the code
    itself writes while it runs, such as a counter of calls, is state and counts for nothing.
    """
    inner = function.func if isinstance(function, partial) else function
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"
    content = repr(Content(inner).of(function))
    return f"{name}#{hashlib.sha256(content.encode()).hexdigest()[:16]}"
