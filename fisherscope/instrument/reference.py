"""What autograd itself says: the reference for what the hooks see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import first_output, probe_inputs
from fisherscope.errors import AdapterError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import Objective
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
        norms = Dense(gradient.float().unsqueeze(0)).norms([m.partition for m in members])
        for member, values in zip(members, norms, strict=True):
            squares[member.first : member.first + values.shape[1]] += values[0].double().cpu()

    with ExitStack() as stack:
        stack.enter_context(_tracked(parameters.values()))
        for name, parameter in parameters.items():

            def hook(parameter: Tensor, name: str = name) -> None:
                if parameter.grad is not None:
                    reduce(name, parameter.grad)
                parameter.grad = None

            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            stack.callback(handle.remove)
        objective(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    return squares


def used_without_a_call(model: nn.Module, modules: Mapping[str, Sequence[nn.Module]]) -> frozenset[str]:
    """Parameters that a model uses without calling the modules they belong to.

    Mamba multiplies with the weight of a projection that it never calls: no hook sees that. One small input
    shows it: none of the parameter's modules is called, and yet its gradient is not zero.

    Args:
        model: a transformers model.
        modules: the modules of each parameter.

    Returns:
        Names of such parameters; none where the model does not run on a small input.
    """
    called: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in {m for owners in modules.values() for m in owners}:
            stack.callback(module.register_forward_hook(lambda m, *_: called.add(m)).remove)
        try:
            first_output(model, probe_inputs(model, 1, seed=0))
        except AdapterError:
            return frozenset()
    names = [name for name, owners in modules.items() if called.isdisjoint(owners)]
    if not names:
        return frozenset()
    parameters = [model.get_parameter(name) for name in names]
    with _tracked(parameters), torch.enable_grad():
        output = first_output(model, probe_inputs(model, 1, seed=0))
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        total = (output * weights).sum()
        if not total.requires_grad:
            return frozenset()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    found = (n for n, g in zip(names, gradients, strict=True) if g is not None and bool(g.any()))
    return frozenset(found)


@contextmanager
def _tracked(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that gather gradients, with their own flags and gradients put aside."""
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        for parameter, *_ in before:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
