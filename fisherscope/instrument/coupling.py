"""Where in a model the samples of a batch begin to influence each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import Objective, Predictions

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
    first, _ = module_outputs(model, objective, alone)
    own = {name: _of_sample(output, alone) for name, output in first.items()}
    second, _ = module_outputs(model, objective, together)
    for name, output in second.items():
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


def module_outputs(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    keep: Callable[[Tensor], Tensor] = lambda output: output.detach().clone(),
) -> tuple[dict[str, Tensor], Predictions | Tensor]:
    """What is kept of the first tensor that each module returns at its first call, in the order of ends.

    Other people's hooks have had their say about it. TorchScript's modules admit no hooks, and are left out.

    Returns:
        What is kept, by the modules' names, and what the objective found.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors and name not in found:
                found[name] = keep(tensors[0])

        return hook

    with ExitStack() as stack, torch.no_grad():
        # checkpoints warn where there is nothing for them to spare
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(watch(name)).remove)
        return found, objective.run(model, batch)
