"""One caller at a time for a model: a collection freezes it, and puts back what it found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fisherscope.errors import ModelBusyError

_mutex = threading.Lock()
_busy: dict[int, int] = {}  # id of a module in use -> the thread that uses it


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Have a model, and every module inside of it, for oneself.

    Raises:
        ModelBusyError: another call has it, in this thread or in another one.
    """
    modules = {id(module) for module in model.modules()}
    here = threading.get_ident()
    with _mutex:
        users = {_busy[module] for module in modules & _busy.keys()}
        if users:
            who = "another call in this thread" if here in users else "another thread"
            raise ModelBusyError(
                f"{who} is collecting from this {type(model).__name__}, which is frozen meanwhile: wait "
                "until that call has returned, or give each thread a model of its own (copy.deepcopy(model))"
            )
        _busy.update(dict.fromkeys(modules, here))
    try:
        yield
    finally:
        with _mutex:
            for module in modules:
                del _busy[module]
