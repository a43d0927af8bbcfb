"""From a family's description of its layers to the layout of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from fisherscope.adapters.patterns import AttentionPattern, MlpPattern
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, MlpLayout, ModelLayout, ParameterInfo
from fisherscope.layout.model import ParameterKind

P = TypeVar("P")


@dataclass(frozen=True)
class Family:
    """Where the layers of a model are and what is in them.

    Attributes:
        layers: path of the list of layers below the base model, such as "layers" or "h".
        attention: pattern of the attention module, for all layers or one per layer; None for a layer without
            attention.
        mlp: pattern of the MLP, likewise; None where channels are not described.
        n_heads: query heads.
        n_kv_heads: key/value heads.
    """

    layers: str
    attention: AttentionPattern | Sequence[AttentionPattern | None]
    mlp: MlpPattern | Sequence[MlpPattern | None] | None
    n_heads: int
    n_kv_heads: int


def build_layout(model: nn.Module, model_type: str, family: Family) -> ModelLayout:
    """Apply a family's patterns to every layer of the live model.

    Raises:
        AdapterError: a module or parameter that the patterns name does not exist.
    """
    container, layers = _layers(model, family.layers)

    def lookup(path: str) -> nn.Module:
        return _submodule(model, path)

    attention: list[AttentionLayout] = []
    mlps: list[MlpLayout] = []
    attention_patterns = _per_layer(family.attention, len(layers), "attention")
    mlp_patterns = _per_layer(family.mlp, len(layers), "mlp")
    for number, (heads, channels) in enumerate(zip(attention_patterns, mlp_patterns, strict=True)):
        path = f"{container}.{number}"
        if heads is not None:
            attention.append(heads.layout(lookup, path, number, family.n_heads, family.n_kv_heads))
        if channels is not None:
            mlps.append(channels.layout(lookup, path, number))
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


def _layers(model: nn.Module, layers: str) -> tuple[str, list[nn.Module]]:
    """Path and content of the list of layers, also where the text model lies inside a multimodal one."""
    prefix = base_prefix(model)
    inner = f"{prefix}language_model."
    modules = dict(model.named_modules())
    path = inner + layers if inner + layers in modules else prefix + layers
    return path, list(_submodule(model, path).children())


def _per_layer(pattern: P | Sequence[P | None] | None, n: int, what: str) -> Sequence[P | None]:
    if not isinstance(pattern, Sequence):
        return [pattern] * n
    if len(pattern) != n:
        raise AdapterError(f"{len(pattern)} {what} patterns for {n} layers: give one for all or one for each")
    return pattern


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
