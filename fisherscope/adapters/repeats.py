"""Which modules run several times in one forward pass: seen by running one."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

from torch import nn

from fisherscope.adapters.inputs import run_small
from fisherscope.errors import AdapterError
from fisherscope.layout import SharedModule


def shared_modules(model: nn.Module) -> tuple[SharedModule, ...]:
    """The modules with parameters that run several times in a forward pass of a small input.

    Of modules inside each other that run equally often the outermost one is named.

    Returns:
        In model order; nothing where the model does not run on a small input.
    """
    runs: Counter[str] = Counter()
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if next(module.parameters(), None) is not None:

                def count(_module: nn.Module, _args: Any, path: str = path) -> None:
                    runs[path] += 1

                stack.callback(module.register_forward_pre_hook(count).remove)
        try:
            run_small(model, 1, seed=0)
        except AdapterError:
            return ()
    return tuple(
        SharedModule(path, number)
        for path, _ in model.named_modules()
        if (number := runs[path]) > max(1, _around(path, runs))
    )


def _around(path: str, runs: Counter[str]) -> int:
    """How often the module runs that is called around this one."""
    while path:
        path = path.rpartition(".")[0]
        if runs[path]:
            return runs[path]
    return 0
