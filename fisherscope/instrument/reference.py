"""What autograd itself says: the reference for what the hooks see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def tracked(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that gather gradients, with their own flags, gradients and hooks put aside."""
    # other people's hooks may step an optimiser as soon as a gradient is there
    before = [(p, p.requires_grad, p.grad, p._post_accumulate_grad_hooks) for p in parameters]
    try:
        for parameter, *_ in before:
            parameter.requires_grad_(True)
            parameter.grad = None
            parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        yield
    finally:
        for parameter, requires_grad, grad, hooks in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
            parameter._post_accumulate_grad_hooks = hooks
