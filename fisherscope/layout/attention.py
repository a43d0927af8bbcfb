"""Heads of one attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fisherscope.layout.partition import Partition

BLOCKS = ("Q", "K", "V", "O")
KEY_VALUE_BLOCKS = frozenset({"K", "V"})

Part = Literal["weight", "bias"]
Flag = Literal["per_head", "per_group", "shared", "coupled"]


def role_of(block: str) -> str:
    """What a block is to its heads, such as "K" for "K.default", the part of K that an adapter adds."""
    return block.partition(".")[0]


@dataclass(frozen=True)
class HeadBlock:
    """One of Q, K, V, O of one layer: a partition of a weight into heads, and of its bias.

    Some architectures have more: "gate" (rows of the query projection that gate the head's context) and
    "sink" (one logit per head that takes attention away). What an adapter adds to a projection is a block of
    its own, named after the two: "Q.default" is cut into the same heads as "Q".

    ``bias`` is None where there is none, and always for O, whose bias belongs to no head.
    """

    name: str
    weight: Partition
    bias: Partition | None = None

    @property
    def role(self) -> str:
        """Its name without that of an adapter: "Q" for "Q" and for "Q.default"."""
        return role_of(self.name)

    @property
    def heads(self) -> int:
        """Number of heads: kv heads for K and V, query heads for all others."""
        return len(self.weight)

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The partitions of weight and bias, as far as there are any."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def part(self, part: Part) -> Partition | None:
        """The partition of the weight or of the bias."""
        return self.weight if part == "weight" else self.bias


@dataclass(frozen=True)
class AttentionLayout:
    """Heads of one attention layer.

    Attributes:
        layer: number of the layer in its stack.
        module: path of the attention module.
        output: path of the O projection, whose input is the concatenation of the heads' contexts.
        n_heads: query heads H.
        n_kv_heads: key/value heads; query head h uses kv head ``h // (H // n_kv_heads)``.
        blocks: Q, K, V, O and what the architecture has beside them, then those of adapters. A layer that
            uses the keys and values of another one has no K and V.
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
            expected = self.n_kv_heads if block.role in KEY_VALUE_BLOCKS else self.n_heads
            if block.heads != expected:
                raise ValueError(f"{self.module}: {block.name} has {block.heads} heads, expected {expected}")
        if unknown := set(self.coupled) - {block.name for block in self.blocks}:
            raise ValueError(f"{self.module}: no block {min(unknown)!r} whose heads could be coupled")

    @property
    def head_dim_qk(self) -> int:
        """Entries of one head's query."""
        return self.block("Q").weight.width

    @property
    def head_dim_v(self) -> int:
        """Entries of one head's value, and so of its context."""
        return self.block("O").weight.width

    def has(self, name: str) -> bool:
        """Whether the layer has a block of that name."""
        return any(block.name == name for block in self.blocks)

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

    def query_heads(self, kv_head: int) -> range:
        """The query heads that use a kv head."""
        if not 0 <= kv_head < self.n_kv_heads:
            raise IndexError(f"layer {self.layer} has {self.n_kv_heads} kv heads, asked for {kv_head}")
        share = self.n_heads // self.n_kv_heads
        return range(kv_head * share, (kv_head + 1) * share)

    def head_of(self, block: str, query_head: int) -> int:
        """Which head of a block a query head uses: its kv head in K and V, itself in all others."""
        kv_head = self.kv_head(query_head)
        return kv_head if role_of(block) in KEY_VALUE_BLOCKS else query_head

    def flags(self, block: str) -> frozenset[Flag]:
        """Whose the slices of a block are: "per_head", or "per_group" of query heads; and "coupled".

        Raises:
            KeyError: no such block in this layer.
        """
        grouped = self.block(block).heads < self.n_heads
        flags: set[Flag] = {"per_group" if grouped else "per_head"}
        if role_of(block) in self.coupled:
            flags.add("coupled")
        return frozenset(flags)
