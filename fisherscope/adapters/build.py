"""From a description of a model's layers to the layout of one model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from fisherscope.adapters.injected import bare_path, tuned_layers
from fisherscope.adapters.modules import has_bias, is_linear_map, out_features, output_axis, weight_shape
from fisherscope.adapters.patterns import AttentionPattern, MlpPattern
from fisherscope.errors import AdapterError
from fisherscope.layout import (
    AttentionLayout,
    ExpertsLayout,
    MlpLayout,
    ModelLayout,
    ParameterInfo,
    Partition,
    RowsLayout,
)
from fisherscope.layout.codec import check_partitions
from fisherscope.layout.model import ParameterKind, Source

Part = TypeVar("Part", AttentionLayout, MlpLayout)
MlpPatterns = MlpPattern | tuple[MlpPattern, ...] | None


@dataclass(frozen=True)
class Stack:
    """Where a stack of layers is and what is in them.

    Where layers differ, a list gives one entry per layer.

    Attributes:
        layers: path of the list of layers below the base model, such as "layers" or "h".
        attention: pattern of the attention module; None for layers without.
        mlp: pattern of the MLP, or a tuple of patterns where a layer has several; None where channels are
            not described.
        n_heads: query heads.
        n_kv_heads: key/value heads.
        name: "decoder", "encoder" or "cross".
    """

    layers: str
    attention: AttentionPattern | list[AttentionPattern | None] | None
    mlp: MlpPatterns | list[MlpPatterns]
    n_heads: int | list[int]
    n_kv_heads: int | list[int]
    name: str = "decoder"


def build_layout(
    model: nn.Module, model_type: str, stacks: Stack | Sequence[Stack], *, source: Source = "registered"
) -> ModelLayout:
    """Apply the patterns to every layer of the live model.

    Raises:
        AdapterError: a module or parameter that the patterns name does not exist or is shared with another
            layer, or what they say contradicts itself.
    """
    return _Builder(model).build(model_type, [stacks] if isinstance(stacks, Stack) else stacks, source)


def build_modules(model: nn.Module, model_type: str) -> ModelLayout:
    """The layout of a model whose heads are not known: its linear maps with their rows."""
    stacks = [Stack(path, None, None, 1, 1, name) for path, name in layer_lists(model)]
    return _Builder(model).build(model_type, stacks, "modules")


def layer_lists(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of the lists of layers in a text model, and the name of each one's stack.

    A list of layers is a ``ModuleList`` with linear maps that lies in no other one. Stacks are told apart by
    the first "encoder" or "decoder" in their path.
    """
    inside = text_prefix(model)
    found: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not path.startswith(inside):
            continue
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if any(is_linear_map(m) for m in module.modules()):
            word = re.search("encoder|decoder", path)
            found.append((path, word[0] if word else "decoder"))
    names = [name for _, name in found]
    return [(path, name if names.count(name) == 1 else path.removeprefix(inside)) for path, name in found]


def text_prefix(model: nn.Module) -> str:
    """Path of the text model inside a multimodal one, with a dot at its end; "" where it is all text."""
    config: Any = model.config
    text = config.get_text_config()
    # of an encoder-decoder that is the decoder's alone
    if text is config or getattr(config, "is_encoder_decoder", False):
        return ""
    for path, module in model.named_modules():
        if path and getattr(module, "config", None) is text:
            return f"{path}."
    return ""


class _Builder:
    """Collects the parts of one model's layout."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._tuned = list(tuned_layers(model))
        # path of a list of layers with a dot at its end -> its stack, and the numbers of its layers
        self._layers: dict[str, tuple[str, dict[str, int]]] = {}
        self._attention: list[AttentionLayout] = []
        self._mlps: list[MlpLayout] = []

    def build(self, model_type: str, stacks: Sequence[Stack], source: Source) -> ModelLayout:
        try:
            for stack in stacks:
                self._add(stack)
            self._settle_shared_weights()
            experts = tuple(self._experts())
            parameters = tuple(self._parameters(experts))
            layout = ModelLayout(
                model_type=model_type,
                parameters=parameters,
                attention=tuple(self._attention),
                mlps=tuple(self._mlps),
                experts=experts,
                rows=tuple(self._rows(parameters)),
                source=source,
            )
            check_partitions(layout)
        except ValueError as error:
            raise AdapterError(f"the description of {model_type!r} contradicts itself: {error}") from error
        return layout

    def _add(self, stack: Stack) -> None:
        path = self._locate(stack.layers)
        layers = [name for name, _ in self._modules[path].named_children()]
        self._layers.setdefault(f"{path}.", (stack.name, {name: i for i, name in enumerate(layers)}))
        columns = (
            _per_layer(stack.attention, len(layers), "attention patterns"),
            _per_layer(stack.mlp, len(layers), "mlp patterns"),
            _per_layer(stack.n_heads, len(layers), "numbers of heads"),
            _per_layer(stack.n_kv_heads, len(layers), "numbers of kv heads"),
        )
        for number, name in enumerate(layers):
            attention, mlp, heads, kv_heads = (column[number] for column in columns)
            where = f"{path}.{name}"
            if attention is not None:
                found = attention.layout(self._lookup, where, number, heads, kv_heads)
                if found is not None:
                    self._attention.append(replace(found, stack=stack.name))
            for pattern in mlp if isinstance(mlp, tuple) else (mlp,):
                channels = None if pattern is None else pattern.layout(self._lookup, where, number)
                if channels is not None:
                    self._mlps.append(replace(channels, stack=stack.name))

    def _locate(self, layers: str) -> str:
        """Path of a list of layers: below the text model, the base model or the decoder, or as it stands."""
        prefix = base_prefix(self._model)
        start: str
        for start in (text_prefix(self._model), f"{prefix}language_model.", prefix, self._decoder(), ""):
            if f"{start}{layers}" in self._modules:
                return f"{start}{layers}"
        # models whose name for their own base is not where it is (Llama 4)
        anywhere = [path for path in self._modules if path.endswith(f".{layers}")]
        if len(anywhere) == 1:
            return anywhere[0]
        raise AdapterError(_missing(self._model, f"{prefix}{layers}"))

    def _decoder(self) -> str:
        getter = getattr(self._model, "get_decoder", None)
        decoder: Any = getter() if getter is not None else None
        return next((f"{path}." for path, module in self._modules.items() if module is decoder and path), "")

    def _lookup(self, path: str) -> nn.Module:
        try:
            return self._modules[path]
        except KeyError:
            raise AdapterError(_missing(self._model, path)) from None

    def _settle_shared_weights(self) -> None:
        """List parts whose weights are all those of another part once, and refuse what is shared in part."""
        own = {id(parameter): name for name, parameter in self._model.named_parameters()}
        every = self._model.named_parameters(remove_duplicate=False)
        tied = {name: own[id(parameter)] for name, parameter in every if own[id(parameter)] != name}
        if tied:
            self._attention = _without_repeats(self._attention, tied)
            self._mlps = _without_repeats(self._mlps, tied)

    def _experts(self) -> Iterator[ExpertsLayout]:
        """Modules of the layers with stacked weights: parameters of three axes, one slice per expert."""
        for path, module in self._modules.items():
            layer, stack = self._place(path)
            own = dict(module.named_parameters(recurse=False))
            stacked = {parameter.shape[0] for parameter in own.values() if parameter.dim() == 3}
            if layer < 0 or len(stacked) != 1:
                continue
            (count,) = stacked
            # the bias of an expert is a row
            parts: dict[int, list[Partition]] = {3: [], 2: []}
            for name, parameter in own.items():
                if parameter.dim() in parts and parameter.shape[0] == count:
                    shape = tuple(parameter.shape)
                    parts[parameter.dim()].append(Partition.regular(f"{path}.{name}", shape, 0, count, 1))
            if "expert" in f"{path} {type(module).__name__}".lower():
                yield ExpertsLayout(layer, path, tuple(parts[3]), tuple(parts[2]), stack)

    def _place(self, path: str) -> tuple[int, str]:
        """Number and stack of the layer that a module or parameter lies in; (-1, "decoder") outside."""
        for container, (stack, numbers) in self._layers.items():
            if path.startswith(container):
                return numbers[path[len(container) :].partition(".")[0]], stack
        return -1, "decoder"

    def _parameters(self, experts: Sequence[ExpertsLayout]) -> Iterator[ParameterInfo]:
        output, base = _output_embeddings(self._model), base_prefix(self._model)
        for name, parameter in self._model.named_parameters():
            module = self._modules[name.rpartition(".")[0]]
            layer, stack = self._place(name)
            attention = next((a for a in self._attention if name.startswith(f"{a.module}.")), None)
            if attention is not None:
                stack = attention.stack  # two stacks share the layers where there is cross attention
            kind: ParameterKind = "other"
            if "norm" in type(module).__name__.lower():
                kind = "norm"
            elif isinstance(module, nn.Embedding) or (layer < 0 and "embed" in name):
                kind = "embedding"
            elif module is output or (layer < 0 and not name.startswith(base)):
                kind = "output"
            elif any(name.startswith(f"{part.module}.") for part in experts):
                kind = "experts"
            elif attention is not None:
                kind = "attention"
            elif _is_router(self._own_name(name), module):
                kind = "router"
            elif any(name.startswith(f"{part.module}.") for part in self._mlps):
                kind = "mlp"
            yield ParameterInfo(name, tuple(parameter.shape), kind, layer, stack)

    def _own_name(self, name: str) -> str:
        """The name of a parameter without PEFT; what PEFT adds beside a layer has that of its weight."""
        tuned = next((path for path in self._tuned if name.startswith(f"{path}.")), None)
        return bare_path(name) if tuned is None else f"{bare_path(tuned)}.weight"

    def _rows(self, parameters: Sequence[ParameterInfo]) -> Iterator[RowsLayout]:
        """Linear maps in the layers of which no head or channel is known; tied ones once."""
        names = {info.name for info in parameters}
        known = [block.partitions for attention in self._attention for block in attention.blocks]
        known += [mlp.partitions for mlp in self._mlps]
        cut = {partition.parameter for partitions in known for partition in partitions}
        for info in parameters:
            path, _, name = info.name.rpartition(".")
            module = self._modules[path]
            if name != "weight" or info.layer < 0 or info.name in cut or not is_linear_map(module):
                continue
            rows = out_features(module)
            weight = Partition.regular(info.name, weight_shape(module), output_axis(module), rows, 1)
            bias = None
            if has_bias(module) and f"{path}.bias" in names:
                bias = Partition.regular(f"{path}.bias", (rows,), 0, rows, 1)
            yield RowsLayout(info.layer, path, weight, bias, info.stack)


def base_prefix(model: nn.Module) -> str:
    """Path of the model without its head: "model." for LlamaForCausalLM, "" for LlamaModel."""
    base = getattr(model, "base_model", model)
    for name, module in model.named_modules():
        if module is base:
            return f"{name}." if name else ""
    return ""


def _per_layer(given: Any, n: int, what: str) -> Sequence[Any]:
    """One entry per layer; a tuple is a single entry, as of several MLPs."""
    if not isinstance(given, list):
        return [given] * n
    if len(given) != n:
        raise AdapterError(f"{len(given)} {what} for {n} layers: give one for all or a list of one for each")
    return given


def _without_repeats(parts: Sequence[Part], tied: Mapping[str, str]) -> list[Part]:
    """Parts without those that are another one under further names, as Zamba's shared blocks are.

    Args:
        parts: attention layers or MLPs.
        tied: further name of a parameter -> the name that ``named_parameters()`` gives.

    Raises:
        AdapterError: a part shares some of its weights with another one.
    """
    cuts = [_cuts(part) for part in parts]
    known = [cut for cut in cuts if not any(partition.parameter in tied for _, partition in cut)]
    kept: list[Part] = []
    for part, cut in zip(parts, cuts, strict=True):
        if cut in known:
            kept.append(part)
            continue
        named = [(block, replace(p, parameter=tied.get(p.parameter, p.parameter))) for block, p in cut]
        if named in known and all(partition.parameter in tied for _, partition in cut):
            continue
        name = next(partition.parameter for _, partition in cut if partition.parameter in tied)
        what = "heads" if isinstance(part, AttentionLayout) else "channels"
        raise AdapterError(
            f"{name} shares one weight with {tied[name]}, which a layout of {what} cannot express: its "
            f"entries would belong to two {what} and be counted twice. Describe what is left with "
            f"fisherscope.wrap(model, adapter=...): a function that gives None for the {what} of layer "
            f"{part.layer} of the {part.stack}"
        )
    return kept


def _cuts(part: AttentionLayout | MlpLayout) -> list[tuple[str, Partition]]:
    """Every partition of a part, with the name of its block."""
    if isinstance(part, MlpLayout):
        return [("", partition) for partition in part.partitions]
    return [(block.name, partition) for block in part.blocks for partition in block.partitions]


def _missing(model: nn.Module, path: str) -> str:
    try:
        shared = model.get_submodule(path)
    except AttributeError:
        shared = None
    if shared is not None:
        first = next(name for name, module in model.named_modules() if module is shared)
        return (
            f"{path} is shared with {first}: they are one module, whose heads and channels can be listed "
            "once. Pass fisherscope.wrap(model, adapter=...): a function that describes them there and gives "
            "None for the layers that share it"
        )
    return (
        f"{type(model).__name__} has no module {path!r} where its adapter expects one: "
        "the architecture changed; register an adapter of your own with fisherscope.adapters.register"
    )


def _is_router(name: str, module: nn.Module) -> bool:
    """Whether a parameter chooses experts: a router, a gate beside experts or beside a shared expert."""
    owner = name.rsplit(".", 2)[-2] if name.count(".") > 1 else ""
    return "router" in f"{name} {type(module).__name__}".lower() or owner in {"gate", "shared_expert_gate"}


def _output_embeddings(model: nn.Module) -> Any:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None
