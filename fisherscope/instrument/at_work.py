"""A model that is about to run for fisherscope, whatever the state that torch and the process are in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from fisherscope.instrument.exclusive import exclusive
from fisherscope.instrument.inference_tensors import ordinary_tensors
from fisherscope.torch_state import standard_state

if TYPE_CHECKING:
    from fisherscope.instrument.scope import Scope

M = TypeVar("M", bound=Callable[..., Any])


@contextmanager
def ready_to_run(model: nn.Module) -> Iterator[None]:
    """A model for oneself, with ordinary tensors, and global states of torch and numpy set aside.

    Raises:
        ModelBusyError: another call is at work with the model.
        AdapterError: a tensor that was made under ``torch.inference_mode`` is in the way of gradients.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    with exclusive(model), standard_state(device), ordinary_tensors(model):
        yield


def at_work(method: M) -> M:
    """Have a method of a scope find its model as it was wrapped, and ready to run."""

    @functools.wraps(method)
    def run(scope: Scope, *args: Any, **kwargs: Any) -> Any:
        with ready_to_run(scope.model):
            scope.structure.refuse_changes(scope.model)
            return method(scope, *args, **kwargs)

    return cast("M", run)
