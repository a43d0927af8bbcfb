"""What autograd itself says: the reference for what the hooks see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import Objective
from fisherscope.instrument.squares import Sinks, measure
from fisherscope.layout import GroupTable
from fisherscope.linalg import Dense


def group_squares(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    parameters: Mapping[str, nn.Parameter],
    groups: GroupTable,
) -> Tensor:
    """``sum g ** 2`` of each group by an ordinary backward pass, for a batch of one sample.

    One parameter's gradient at a time is alive; ``requires_grad`` and ``.grad`` are restored.

    Returns:
        ``[groups]``, float64 on the CPU.
    """
    squares = torch.zeros(len(groups), dtype=torch.float64)

    def reduce(name: str, gradient: Tensor) -> None:
        members = groups.members[name]
        one = torch.ones(1, dtype=torch.float32, device=gradient.device)
        found = measure(Dense(gradient.float().unsqueeze(0)), one, [m.partition for m in members], Sinks())
        for member, values in zip(members, found.pieces, strict=True):
            squares[member.first : member.first + values.shape[1]] += values[0].cpu()

    with ExitStack() as stack:
        stack.enter_context(tracked(parameters.values()))
        for name, parameter in parameters.items():

            def hook(parameter: Tensor, name: str = name) -> None:
                if parameter.grad is not None:
                    reduce(name, parameter.grad)
                parameter.grad = None

            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            stack.callback(handle.remove)
        objective.losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    return squares


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
