"""The layout of a whole model: which entries of which parameter belong to which head or channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fisherscope.layout.attention import AttentionLayout, Flag, HeadBlock, Part
from fisherscope.layout.describing import in_lines, in_one_line
from fisherscope.layout.mlp import ExpertsLayout, MlpLayout, RowsLayout
from fisherscope.layout.partition import Partition
from fisherscope.layout.shared import SharedModule
from fisherscope.layout.slices import ParameterSlice

ParameterKind = Literal["attention", "mlp", "experts", "router", "norm", "embedding", "output", "other"]
Source = Literal["registered", "detected", "modules"]


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of the model and where it belongs.

    ``layer`` is -1 for parameters outside the layers. Kind "other": the weights of modules that are neither
    attention nor MLP, such as state-space mixers, and of other towers of a multimodal model.
    """

    name: str
    shape: tuple[int, ...]
    kind: ParameterKind
    layer: int = -1
    stack: str = "decoder"


@dataclass(frozen=True, repr=False)
class ModelLayout:
    """Index data for one model: every parameter, every head slice, every MLP channel.

    Attributes:
        model_type: the HuggingFace ``config.model_type``.
        parameters: every parameter of the model, in ``named_parameters()`` order.
        attention: one entry per attention layer.
        mlps: one entry per MLP.
        experts: one entry per mixture of experts with stacked weights.
        rows: one entry per linear map of the layers whose heads or channels are not described.
        source: who described the layers: a "registered" adapter, or "detected" from the model's structure;
            "modules" where heads could not be found, so that modules and rows are all there is.
        shared: modules that run several times in a forward pass, as seen on a small input.

    ``print(layout)`` shows a summary in a few lines, ``repr`` in one; :meth:`to_json` has everything.

    Raises:
        ValueError: two attention layers have the same number in the same stack.
    """

    model_type: str
    parameters: tuple[ParameterInfo, ...]
    attention: tuple[AttentionLayout, ...]
    mlps: tuple[MlpLayout, ...] = ()
    experts: tuple[ExpertsLayout, ...] = ()
    rows: tuple[RowsLayout, ...] = ()
    source: Source = "registered"
    shared: tuple[SharedModule, ...] = ()

    def __post_init__(self) -> None:
        places: dict[tuple[str, int], str] = {}
        for attention in self.attention:
            place = (attention.stack, attention.layer)
            if place in places:
                raise ValueError(
                    f"{places[place]} and {attention.module} are both layer {attention.layer} of the stack "
                    f"{attention.stack!r}: give one of their stacks another name"
                )
            places[place] = attention.module

    def __repr__(self) -> str:
        return f"<ModelLayout of {in_one_line(self)}>"

    def __str__(self) -> str:
        return in_lines(self)

    @cached_property
    def _by_name(self) -> dict[str, ParameterInfo]:
        return {info.name: info for info in self.parameters}

    def parameter(self, name: str) -> ParameterInfo:
        """Shape and place of one parameter.

        Raises:
            KeyError: the model has no parameter of that name.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise KeyError(f"the model has no parameter {name!r}") from None

    def stack_or_only(self, stack: str | None) -> str:
        """The stack that is meant: where None, the only one with attention, or the decoder of several."""
        stacks = {attention.stack for attention in self.attention}
        if stack is None:
            return next(iter(stacks)) if len(stacks) == 1 else "decoder"
        return stack

    def runs(self, name: str) -> int:
        """How often a module, or the module of a parameter, runs in a forward pass, as far as was seen."""
        return max((found.runs for found in self.shared if found.holds(name)), default=1)

    def attention_layer(self, layer: int, stack: str | None = None) -> AttentionLayout:
        """The attention layer of that number.

        Args:
            layer: number of the layer in its stack.
            stack: "decoder", "encoder" or "cross"; the only stack where None, and the decoder of several.

        Raises:
            KeyError: no such attention layer.
        """
        stack = self.stack_or_only(stack)
        for attention in self.attention:
            if attention.layer == layer and attention.stack == stack:
                return attention
        known = [a.layer for a in self.attention if a.stack == stack]
        if not known and self.attention:
            stacks = list(dict.fromkeys(a.stack for a in self.attention))
            raise KeyError(f"no attention of the {stack}: pass a stack= that there is, {stacks}")
        raise KeyError(f"no attention in layer {layer} of the {stack}: layers with attention are {known}")

    def slice(
        self, layer: int, block: str, head: int, *, part: Part = "weight", stack: str | None = None
    ) -> ParameterSlice:
        """The slice of one head: a query head for Q and O, a kv head for K and V.

        The stack is as in :meth:`attention_layer`.

        Raises:
            KeyError: no such layer, block, or bias.
            IndexError: no such head.
        """
        partition = self.attention_layer(layer, stack).block(block).part(part)
        if partition is None:
            raise KeyError(f"{block} of layer {layer} has no per-head {part}")
        return partition[head]

    def query_head_slice(
        self, layer: int, block: str, query_head: int, *, part: Part = "weight", stack: str | None = None
    ) -> ParameterSlice:
        """The slice that a query head uses: its own, or in K and V that of its kv head.

        Query heads of one group share their K and V slices: the same entries come back for each of them.

        Raises:
            KeyError: no such layer, block, or bias.
            IndexError: no such query head.
        """
        head = self.attention_layer(layer, stack).head_of(block, query_head)
        return self.slice(layer, block, head, part=part, stack=stack)

    def flags(self, parameter: str) -> frozenset[Flag]:
        """Whose the entries of a parameter of an attention layer are.

        Returns:
            "per_head" and "per_group" where slices of the parameter belong to query heads or kv heads,
            "coupled" where a norm over all heads ties them; "shared" for a parameter that serves all heads,
            such as O's bias or a norm of the keys; nothing outside attention.

        Raises:
            KeyError: the model has no parameter of that name.
        """
        if self.parameter(parameter).kind != "attention" and not self._attends(parameter):
            return frozenset()
        found = [
            attention.flags(block.name)
            for attention, block in self.head_blocks()
            if any(partition.parameter == parameter for partition in block.partitions)
        ]
        return frozenset().union(*found) if found else frozenset({"shared"})

    def _attends(self, parameter: str) -> bool:
        return any(parameter.startswith(f"{attention.module}.") for attention in self.attention)

    def head_blocks(self) -> Iterator[tuple[AttentionLayout, HeadBlock]]:
        """Every block of every attention layer."""
        for attention in self.attention:
            for block in attention.blocks:
                yield attention, block

    def partitions(self) -> Iterator[Partition]:
        """Those of every head block, MLP, mixture of experts and linear map."""
        for _, block in self.head_blocks():
            yield from block.partitions
        modules: list[MlpLayout | ExpertsLayout | RowsLayout] = [*self.mlps, *self.experts, *self.rows]
        for module in modules:
            yield from module.partitions

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; :meth:`from_json` reads it back."""
        from fisherscope.layout import codec

        return codec.encode(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelLayout:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not a layout.
        """
        from fisherscope.layout import codec

        return codec.decode(data)
