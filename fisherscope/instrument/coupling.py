"""Where in a model the samples of a batch begin to influence each other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import Objective

_TOLERANCE = 1e-3


def first_coupled_module(model: nn.Module, objective: Objective, alone: Batch, together: Batch) -> str | None:
    """The first module whose output for a sample changes with the other samples of its batch.

    Args:
        model: the model.
        objective: runs it.
        alone: a batch of one sample.
        together: that sample first, and others.

    Returns:
        The module's name; None where no output changes, so that it must be the loss.
    """
    own = {name: _of_sample(output, alone) for name, output in _outputs(model, objective, alone)}
    for name, output in _outputs(model, objective, together):
        mine, other = own.get(name), _of_sample(output, together)
        if mine is None or other is None or mine.shape != other.shape or not mine.is_floating_point():
            continue
        scale = mine.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        if float((mine.float() - other.float()).abs().max() / scale) > _TOLERANCE:
            return name
    return None


def _of_sample(output: Tensor, batch: Batch) -> Tensor | None:
    """The attended positions of the first sample, where the output has samples and positions."""
    n, width = batch.input_ids.shape
    if output.dim() < 1 or output.shape[0] != n:
        return None
    if output.dim() > 1 and width and output.shape[1] == width:
        return output[0][batch.attention_mask[0].bool().to(output.device)]
    return output[0]


def _outputs(model: nn.Module, objective: Objective, batch: Batch) -> list[tuple[str, Tensor]]:
    """The first tensor that each module returns at its first call, in the order in which they end."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors and name not in found:
                found[name] = tensors[0].detach().clone()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(watch(name)).remove)
        objective.predict(model, batch)
    return list(found.items())
