"""The check of a layout that needs no forward pass: its slices lie where the model keeps its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fisherscope.adapters.modules import has_bias, is_linear_map, output_axis, weight_shape
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, Partition


def check_places(model: nn.Module, attention: AttentionLayout) -> None:
    """Heads of Q, K, V and gates are output features, those of O inputs; together they are all there is.

    Raises:
        AdapterError: a slice lies along the wrong axis or in the wrong parameter, a bias is missing or cut in
            another way than its weight, or heads of one projection overlap or leave entries out.
    """
    projected = [b for b in attention.blocks if b.name in {"Q", "gate", "K", "V"}]
    for block in projected:
        _check_side(model, block.weight, of_outputs=True)
        _check_bias(model, block)
    output = attention.block("O")
    _check_side(model, output.weight, of_outputs=False)
    if output.weight.module != attention.output:
        raise AdapterError(f"O is cut from {output.weight.parameter}, not from {attention.output}")
    if output.bias is not None:
        raise AdapterError("O's bias is added to the sum over heads: it belongs to none of them")
    _check_whole([*(b.weight for b in projected), output.weight])


def check_channel_places(model: nn.Module, mlp: MlpLayout) -> None:
    """Channels are output features of the expanding projections and inputs of the contracting one.

    Raises:
        AdapterError: a slice lies along the wrong axis, a bias is missing or cut in another way than its
            weight, or channels overlap or leave entries out.
    """
    *expand, contract = mlp.weights
    for partition in expand:
        _check_side(model, partition, of_outputs=True)
    _check_side(model, contract, of_outputs=False)
    _check_whole([*expand, contract])
    wanted = [(f"{p.module}.bias", p.starts) for p in expand if has_bias(model.get_submodule(p.module))]
    if sorted(wanted) != sorted((p.parameter, p.starts) for p in mlp.biases):
        raise AdapterError("the biases of the channels are cut differently from their weights")


def _check_side(model: nn.Module, partition: Partition, *, of_outputs: bool) -> None:
    path = partition.module
    module = model.get_submodule(path)
    if isinstance(module, torch.jit.ScriptModule):
        raise AdapterError(
            f"{path} is TorchScript, whose calls cannot be watched: pass the model as it was before torch.jit"
        )
    if not is_linear_map(module):
        raise AdapterError(f"{path} is not the linear map of its weight: its output is something else")
    axis = output_axis(module) if of_outputs else 1 - output_axis(module)
    if partition.shape != weight_shape(module) or partition.axis != axis:
        raise AdapterError(
            f"{partition.parameter} of shape {weight_shape(module)} is cut along axis {partition.axis} of "
            f"{partition.shape}: its {'outputs' if of_outputs else 'inputs'} are axis {axis}"
        )


def _check_bias(model: nn.Module, block: HeadBlock) -> None:
    path = block.weight.module
    wanted = f"{path}.bias" if has_bias(model.get_submodule(path)) else None
    bias = block.bias
    if (None if bias is None else bias.parameter) != wanted:
        raise AdapterError(f"the bias of {block.name} is {bias and bias.parameter}, not {wanted}")
    if bias is not None and (bias.starts, bias.width) != (block.weight.starts, block.weight.width):
        raise AdapterError(f"the bias of {block.name} is cut differently from its weight")


def _check_whole(partitions: Sequence[Partition]) -> None:
    """All pieces of one parameter hold each index of the axis once."""
    for name in dict.fromkeys(p.parameter for p in partitions):
        mine = [p for p in partitions if p.parameter == name]
        indices = sorted(_indices(mine))
        if indices != list(range(mine[0].shape[mine[0].axis])):
            raise AdapterError(f"the pieces of {name} overlap or leave entries out")


def _indices(partitions: Iterable[Partition]) -> Iterable[int]:
    return (i for p in partitions for start in p.starts for i in range(start, start + p.width))
