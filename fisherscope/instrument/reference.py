"""What autograd itself says: the reference for what the hooks see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import POSITIONS, first_output, probe_inputs
from fisherscope.errors import AdapterError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.lookup import has_samples
from fisherscope.instrument.objectives import Objective
from fisherscope.layout import GroupTable
from fisherscope.linalg import Dense

_ROWS = 3  # samples of the small input: another number than that of its positions


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


def unseen_by_hooks(model: nn.Module, modules: Mapping[str, Sequence[nn.Module]]) -> dict[str, str]:
    """Parameters whose per-sample gradients hooks cannot see, found out on a small input, and why.

    Mamba multiplies with the weight of a projection that it never calls; T5's table of position biases is
    looked up once for all samples and pairs of positions.

    Args:
        model: a transformers model.
        modules: the modules of each parameter.

    Returns:
        Parameter -> reason; empty where the model does not run on a small input.
    """
    called: set[nn.Module] = set()
    mixed: set[nn.Module] = set()

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        called.add(module)
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if given is None:
            return
        ids = not given.is_floating_point()
        flat = given.dim() == 2 and given.shape[0] == _ROWS * POSITIONS
        if not (has_samples(given, _ROWS) if ids else given.shape[0] == _ROWS or flat):
            mixed.add(module)

    with ExitStack() as stack:
        for module in {m for owners in modules.values() for m in owners}:
            stack.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        try:
            first_output(model, probe_inputs(model, _ROWS, seed=0))
        except AdapterError:
            return {}
    reasons = {
        name: "its module mixes samples with positions"
        for name, owners in modules.items()
        if not mixed.isdisjoint(owners)
    }
    uncalled = [name for name, owners in modules.items() if called.isdisjoint(owners)]
    return reasons | dict.fromkeys(_with_gradient(model, uncalled), "used without a call of its module")


def _with_gradient(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Which of the parameters have a gradient that is not zero, on a small input."""
    if not names:
        return []
    parameters = [model.get_parameter(name) for name in names]
    with _tracked(parameters), torch.enable_grad():
        output = first_output(model, probe_inputs(model, 1, seed=0))
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        total = (output * weights).sum()
        if not total.requires_grad:
            return []
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [name for name, g in zip(names, gradients, strict=True) if g is not None and bool(g.any())]


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
