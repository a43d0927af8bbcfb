"""Whose heads and channels the parameters are that PEFT adds beside a projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fisherscope.adapters.injected import plain_layer, tuned_layers
from fisherscope.adapters.modules import is_linear_map, output_axis
from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, ModelLayout, Partition

_BASE = ".base_layer"
# of LoRA, AdaLoRA, IA3 and VeRA: what has an entry or row for each output feature of the projection, and what
# has a column for each input feature; IA3 has either
_OF_OUTPUTS = ("lora_B", "ia3_l", "vera_lambda_b")
_OF_INPUTS = ("lora_A", "ia3_l")
_MAGNITUDE = "lora_magnitude_vector"


def with_adapters(model: nn.Module, layout: ModelLayout) -> ModelLayout:
    """The layout with the heads and channels of what PEFT has added.

    Of LoRA's W + s B A the rows of B are output features, and the columns of A input features, in the order
    of W: heads of Q, K, V lie in B and those of O in A; channels in B of the expanding projections and in A
    of the contracting one. The other matrix serves all of them. DoRA's magnitudes, and the factors of IA3 and
    VeRA, are features, too.

    Args:
        model: the model.
        layout: of its own layers.

    Returns:
        The layout with a block such as "Q.default" for each adapter and block that it changes, and an MLP of
        block "mlp.default"; itself for a model without such adapters.
    """
    tuners = {path: m for path, m in tuned_layers(model).items() if is_linear_map(plain_layer(m))}
    every = [
        name for layer in tuners.values() for kind in (*_OF_OUTPUTS, *_OF_INPUTS) for name in _of(layer, kind)
    ]
    if not every:
        return layout
    names = list(dict.fromkeys(every))
    attention = tuple(
        replace(
            part, blocks=(*part.blocks, *(b for name in names for b in _blocks(model, tuners, part, name)))
        )
        for part in layout.attention
    )
    channels = (_channels(model, tuners, mlp, name) for name in names for mlp in layout.mlps)
    mlps = (*layout.mlps, *(mlp for mlp in channels if mlp is not None))
    described = {path for partition in _weights(layout) for path in _around(partition.module, tuners)}
    rows = tuple(r for r in layout.rows if not any(r.module.startswith(f"{path}.") for path in described))
    return replace(layout, attention=attention, mlps=mlps, rows=rows)


def _of(layer: nn.Module, kind: str) -> Mapping[str, Any]:
    """What the adapters of a layer have of one kind, by their names."""
    found = getattr(layer, kind, None)
    return dict(found.items()) if isinstance(found, nn.ModuleDict | nn.ParameterDict) else {}


def _weights(layout: ModelLayout) -> Iterator[Partition]:
    for _, block in layout.head_blocks():
        yield block.weight
    for mlp in layout.mlps:
        yield from mlp.weights


def _around(module: str, tuners: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of the layers of PEFT around a projection, from the inside out."""
    while module.endswith(_BASE):
        module = module.removesuffix(_BASE)
        if module in tuners:
            yield module


def _blocks(
    model: nn.Module, tuners: Mapping[str, nn.Module], attention: AttentionLayout, adapter: str
) -> Iterator[HeadBlock]:
    for block in attention.blocks:
        found = _pieces(model, tuners, block.weight, adapter)
        if "weight" in found:
            yield HeadBlock(f"{block.name}.{adapter}", found["weight"], found.get("bias"))
        if "magnitude" in found:
            yield HeadBlock(f"{block.name}.{adapter}.magnitude", found["magnitude"])


def _channels(
    model: nn.Module, tuners: Mapping[str, nn.Module], mlp: MlpLayout, adapter: str
) -> MlpLayout | None:
    found = [_pieces(model, tuners, weight, adapter) for weight in mlp.weights]
    weights = [pieces[part] for pieces in found for part in ("weight", "magnitude") if part in pieces]
    biases = [pieces["bias"] for pieces in found if "bias" in pieces]
    if not weights:
        return None
    return replace(mlp, weights=tuple(weights), biases=tuple(biases), block=f"{mlp.block}.{adapter}")


def _pieces(
    model: nn.Module, tuners: Mapping[str, nn.Module], own: Partition, adapter: str
) -> dict[str, Partition]:
    """An adapter's entries that belong to the pieces of a projection: of a weight, a bias, a magnitude.

    Args:
        model: the model.
        tuners: its layers of PEFT.
        own: the pieces of the projection's weight.
        adapter: name of the adapter.
    """
    found: dict[str, Partition] = {}
    for path in _around(own.module, tuners):
        layer = tuners[path]
        of_outputs = own.axis == output_axis(model.get_submodule(own.module))
        for kind in _OF_OUTPUTS if of_outputs else _OF_INPUTS:
            found |= _cut(
                own, f"{path}.{kind}.{adapter}", _of(layer, kind).get(adapter), 0 if of_outputs else 1
            )
        if of_outputs:
            magnitude = _of(layer, _MAGNITUDE).get(adapter)
            if cut := _cut(own, f"{path}.{_MAGNITUDE}.{adapter}", magnitude, 0):
                found["magnitude"] = cut["weight"]
    return found


def _cut(own: Partition, name: str, added: Any, axis: int) -> dict[str, Partition]:
    """Cut a matrix or vector along the axis of features as the projection's weight is cut along its own."""
    parts = {"weight": (name, added)}
    if isinstance(added, nn.Module):
        parts = {part: (f"{name}.{part}", getattr(added, part, None)) for part in ("weight", "bias")}
    found = {}
    for part, (parameter, values) in parts.items():
        along = 0 if part == "bias" else axis
        # biases are output features; and IA3's factors may be those of the other side
        if not isinstance(values, nn.Parameter) or (part == "bias" and axis):
            continue
        shape = tuple(values.shape)
        if len(shape) > along and shape[along] == own.shape[own.axis]:
            found[part] = Partition(parameter, shape, along, own.starts, own.width)
    return found
