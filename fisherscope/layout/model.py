"""The layout of a whole model: which entries of which parameter belong to which head or channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from fisherscope.layout.partition import Partition
from fisherscope.layout.slices import ParameterSlice

BLOCKS = ("Q", "K", "V", "O")

ParameterKind = Literal["attention", "mlp", "norm", "embedding", "output", "other"]
Part = Literal["weight", "bias"]


@dataclass(frozen=True)
class HeadBlock:
    """One of Q, K, V, O of one layer: a partition of a weight into heads, and of its bias.

    ``bias`` is None where there is none, and always for O, whose bias belongs to no head.
    """

    name: str
    weight: Partition
    bias: Partition | None = None

    @property
    def heads(self) -> int:
        """Number of heads: query heads for Q and O, kv heads for K and V."""
        return len(self.weight)

    def part(self, part: Part) -> Partition | None:
        """The partition of the weight or of the bias."""
        return self.weight if part == "weight" else self.bias


@dataclass(frozen=True)
class AttentionLayout:
    """Heads of one attention layer.

    Attributes:
        layer: decoder-layer number.
        module: path of the attention module.
        output: path of the O projection, whose input is the concatenation of the heads' contexts.
        n_heads: query heads H.
        n_kv_heads: key/value heads; query head h uses kv head ``h // (H // n_kv_heads)``.
        blocks: Q, K, V, O.
        stack: "decoder", "encoder" or "cross".
        coupled: blocks whose heads a norm over all of them ties (OLMo 2 normalises Q and K that way): the
            slices are exact, but a change of one head's slice moves the other heads too.
    """

    layer: int
    module: str
    output: str
    n_heads: int
    n_kv_heads: int
    blocks: tuple[HeadBlock, ...]
    stack: str = "decoder"
    coupled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.module}: {self.n_heads} query heads cannot share {self.n_kv_heads} kv heads evenly"
            )
        for block in self.blocks:
            expected = self.n_kv_heads if block.name in {"K", "V"} else self.n_heads
            if block.heads != expected:
                raise ValueError(f"{self.module}: {block.name} has {block.heads} heads, expected {expected}")
        if unknown := set(self.coupled) - {block.name for block in self.blocks}:
            raise ValueError(f"{self.module}: no block {min(unknown)!r} whose heads could be coupled")

    def block(self, name: str) -> HeadBlock:
        """The block of that name.

        Raises:
            KeyError: no such block in this layer.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(f"layer {self.layer} has no block {name!r}: it has {[b.name for b in self.blocks]}")

    def kv_head(self, query_head: int) -> int:
        """The kv head which a query head uses."""
        if not 0 <= query_head < self.n_heads:
            raise IndexError(f"layer {self.layer} has {self.n_heads} query heads, asked for {query_head}")
        return query_head // (self.n_heads // self.n_kv_heads)


@dataclass(frozen=True)
class MlpLayout:
    """Channels of one MLP: channel c is a gate row, an up row and a down column.

    ``weights`` and ``biases`` are partitions of width 1 with one piece per channel; the down
    projection's bias belongs to no channel.
    """

    layer: int
    module: str
    weights: tuple[Partition, ...]
    biases: tuple[Partition, ...] = ()
    stack: str = "decoder"

    def __post_init__(self) -> None:
        lengths = {len(p) for p in (*self.weights, *self.biases)}
        if len(lengths) != 1:
            raise ValueError(
                f"{self.module}: partitions disagree on the number of channels: {sorted(lengths)}"
            )

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.weights[0])


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of the model and where it belongs.

    ``layer`` is -1 for parameters outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    kind: ParameterKind
    layer: int = -1
    stack: str = "decoder"


@dataclass(frozen=True)
class ModelLayout:
    """Index data for one model: every parameter, every head slice, every MLP channel.

    Attributes:
        model_type: the HuggingFace ``config.model_type``.
        parameters: every parameter of the model, in ``named_parameters()`` order.
        attention: one entry per attention layer.
        mlps: one entry per MLP.
    """

    model_type: str
    parameters: tuple[ParameterInfo, ...]
    attention: tuple[AttentionLayout, ...]
    mlps: tuple[MlpLayout, ...] = ()

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

    def attention_layer(self, layer: int, stack: str = "decoder") -> AttentionLayout:
        """The attention layer of that number.

        Raises:
            KeyError: no such attention layer.
        """
        for attention in self.attention:
            if attention.layer == layer and attention.stack == stack:
                return attention
        known = [a.layer for a in self.attention if a.stack == stack]
        raise KeyError(f"no attention in layer {layer} of the {stack}: layers with attention are {known}")

    def slice(
        self, layer: int, block: str, head: int, *, part: Part = "weight", stack: str = "decoder"
    ) -> ParameterSlice:
        """The slice of one head: a query head for Q and O, a kv head for K and V.

        Raises:
            KeyError: no such layer, block, or bias.
            IndexError: no such head.
        """
        partition = self.attention_layer(layer, stack).block(block).part(part)
        if partition is None:
            raise KeyError(f"{block} of layer {layer} has no per-head {part}")
        return partition[head]

    def head_blocks(self) -> Iterator[tuple[AttentionLayout, HeadBlock]]:
        """Every block of every attention layer."""
        for attention in self.attention:
            for block in attention.blocks:
                yield attention, block

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
