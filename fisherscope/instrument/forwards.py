"""Standing directly around a module's forward: inside of every hook, whoever registered it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Around = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def around(module: nn.Module, call: Around) -> Iterator[None]:
    """Have ``call(forward, args, kwargs)`` run in place of the module's forward.

    Forward hooks, global ones among them, may change what a module returns, and a hook of ours would see what
    those before it have made of it. Here args are what the layer itself is given, behind all pre-hooks, and
    what ``forward`` returns is what the layer itself has computed. A forward that somebody else has put on
    the module, as accelerate does, is the ``forward`` of the call.
    """
    forward = module.forward

    @functools.wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return call(forward, args, kwargs)

    with replaced_forward(module, replaced):
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Another forward for one module, and its own one back on any exit."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own
