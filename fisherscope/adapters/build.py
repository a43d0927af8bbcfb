"""From a family's description of its layers to the layout of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fisherscope.adapters.patterns import AttentionPattern, MlpPattern
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, MlpLayout, ModelLayout, ParameterInfo
from fisherscope.layout.model import ParameterKind


@dataclass(frozen=True)
class Family:
    """Where the layers of a model are and what is in them.

    Attributes:
        layers: path of the list of layers below the base model, such as "layers" or "h".
        attention: pattern of the attention module in each layer.
        mlp: pattern of the MLP in each layer, None where channels are not described.
        n_heads: query heads.
        n_kv_heads: key/value heads.
    """

    layers: str
    attention: AttentionPattern
    mlp: MlpPattern | None
    n_heads: int
    n_kv_heads: int


def build_layout(model: nn.Module, model_type: str, family: Family) -> ModelLayout:
    """Apply a family's patterns to every layer of the live model.

    Raises:
        AdapterError: a module or parameter that the patterns name does not exist.
    """
    prefix = base_prefix(model)
    container = f"{prefix}{family.layers}"
    layers = _submodule(model, container)
    attention: list[AttentionLayout] = []
    mlps: list[MlpLayout] = []
    for number, _ in enumerate(layers.children()):
        path = f"{container}.{number}"
        attention.append(
            family.attention.layout(
                lambda name: _submodule(model, name), path, number, family.n_heads, family.n_kv_heads
            )
        )
        if family.mlp is not None:
            mlps.append(family.mlp.layout(lambda name: _submodule(model, name), path, number))
    return ModelLayout(
        model_type=model_type,
        parameters=_parameters(model, container, attention, mlps),
        attention=tuple(attention),
        mlps=tuple(mlps),
    )


def base_prefix(model: nn.Module) -> str:
    """Path of the model without its head: "model." for LlamaForCausalLM, "" for LlamaModel."""
    base = getattr(model, "base_model", model)
    for name, module in model.named_modules():
        if module is base:
            return f"{name}." if name else ""
    return ""


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise AdapterError(
            f"{type(model).__name__} has no module {path!r} where its adapter expects one: "
            "the architecture changed; register an adapter of your own with fisherscope.adapters.register"
        ) from None


def _parameters(
    model: nn.Module, container: str, attention: list[AttentionLayout], mlps: list[MlpLayout]
) -> tuple[ParameterInfo, ...]:
    modules = dict(model.named_modules())
    output = _output_embeddings(model)
    infos = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        layer = -1
        if name.startswith(f"{container}."):
            layer = int(name[len(container) + 1 :].partition(".")[0])
        kind: ParameterKind = "other"
        if any(name.startswith(f"{a.module}.") for a in attention if a.layer == layer):
            kind = "attention"
        elif any(name.startswith(f"{m.module}.") for m in mlps if m.layer == layer):
            kind = "mlp"
        module = modules[owner]
        if "norm" in type(module).__name__.lower():
            kind = "norm"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif module is output:
            kind = "output"
        infos.append(ParameterInfo(name, tuple(parameter.shape), kind, layer))
    return tuple(infos)


def _output_embeddings(model: nn.Module) -> Any:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None
