"""How attention projections and MLPs are laid out, as data: no pattern copies or splits a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import nn

from fisherscope.adapters.injected import projection
from fisherscope.adapters.modules import (
    has_bias,
    in_features,
    is_linear_map,
    out_features,
    output_axis,
    weight_shape,
)
from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, Partition

Lookup = Callable[[str], nn.Module]


class AttentionPattern(Protocol):
    """Finds the heads of one attention module."""

    def layout(
        self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int
    ) -> AttentionLayout | None:
        """The layout of the attention module in the layer at ``path``; None if an optional one is absent."""
        ...


class MlpPattern(Protocol):
    """Finds the channels of one MLP."""

    def layout(self, lookup: Lookup, path: str, layer: int) -> MlpLayout | None:
        """The layout of the MLP in the layer at ``path``; None if an optional one is absent."""
        ...


@dataclass(frozen=True)
class Separate:
    """Q, K and V each have a projection of their own (Llama, Qwen, Mistral, OPT, BERT, ...).

    Attributes:
        module: path of the attention module in the layer; empty for projections in the layer itself.
        query, key, value, output: paths of the projections in the attention module. ``key`` and ``value`` are
            None where a layer uses those of another one.
        coupled: blocks that a norm over all heads ties (OLMo 2).
        gated: the query projection has, per head, the query and then a gate of the same size (Qwen3-Next).
        sinks: name of a parameter with one logit per head that takes attention away (gpt-oss).
        optional: layers without these modules have no heads.
    """

    module: str = "self_attn"
    query: str = "q_proj"
    key: str | None = "k_proj"
    value: str | None = "v_proj"
    output: str = "o_proj"
    coupled: tuple[str, ...] = ()
    gated: bool = False
    sinks: str | None = None
    optional: bool = False

    def layout(
        self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int
    ) -> AttentionLayout | None:
        """One partition of each projection along its output features; widths come from the weights."""
        attention = _below(path, self.module)
        if self.optional and not _has_projection(lookup, f"{attention}.{self.query}"):
            return None
        blocks: list[HeadBlock] = []
        own = ("Q", "gate") if self.gated else ("Q",)
        blocks += _cut(lookup, f"{attention}.{self.query}", own, dict.fromkeys(own, n_heads), n_heads)
        for name, module in (("K", self.key), ("V", self.value)):
            if module is not None:
                blocks += _cut(lookup, f"{attention}.{module}", (name,), {name: n_kv_heads})
        if self.sinks is not None:
            sinks = Partition.regular(f"{attention}.{self.sinks}", (n_heads,), 0, n_heads, 1)
            blocks.append(HeadBlock("sink", sinks))
        return _attention(lookup, layer, attention, self.output, (n_heads, n_kv_heads), blocks, self.coupled)


@dataclass(frozen=True)
class Fused:
    """One projection for Q, K and V: ``sections`` equal parts, each with its share of every block's heads.

    Attributes:
        module: path of the attention module in the layer.
        fused, output: paths of the projections in the attention module.
        sections: number of parts; None for one part per kv head.
        order: of the blocks within a part. CodeGen was trained on four devices and kept their four parts,
            each [queries | values | keys].
        coupled: blocks that a norm over all heads ties.
        optional: layers without these modules have no heads.
    """

    module: str
    fused: str
    output: str
    sections: int | None
    order: tuple[str, ...] = ("Q", "K", "V")
    coupled: tuple[str, ...] = ()
    optional: bool = False

    def layout(
        self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int
    ) -> AttentionLayout | None:
        """Three partitions of the fused projection."""
        attention = _below(path, self.module)
        if self.optional and not _has_projection(lookup, f"{attention}.{self.fused}"):
            return None
        sections = n_kv_heads if self.sections is None else self.sections
        heads = {"Q": n_heads, "K": n_kv_heads, "V": n_kv_heads}
        blocks = _cut(lookup, f"{attention}.{self.fused}", self.order, heads, sections)
        return _attention(lookup, layer, attention, self.output, (n_heads, n_kv_heads), blocks, self.coupled)


def Concat(  # noqa: N802 - reads like the patterns beside it
    module: str, fused: str, output: str, *, optional: bool = False
) -> Fused:
    """One fused projection whose output is [all Q heads | all K heads | all V heads] (GPT-2, Phi-3, MPT)."""
    return Fused(module, fused, output, sections=1, optional=optional)


def Grouped(  # noqa: N802 - reads like the patterns beside it
    module: str, fused: str, output: str, *, optional: bool = False
) -> Fused:
    """One fused projection, kv head by kv head: its query heads, its key, its value.

    With one kv head per query head that is [q k v | q k v | ...] (GPT-NeoX, Bloom); with several query heads
    per kv head [q q k v | q q k v | ...] (Falcon 40B and later); with a single kv head it is the same as
    :func:`Concat` (Falcon 7B).
    """
    return Fused(module, fused, output, sections=None, optional=optional)


@dataclass(frozen=True)
class JoinedKeyValue:
    """Q has a projection of its own, K and V share one: [all K | all V], or head by head if ``grouped``.

    ``order`` tells which of the two comes first.
    """

    module: str
    query: str
    key_value: str
    output: str
    grouped: bool = False
    order: tuple[str, str] = ("K", "V")
    coupled: tuple[str, ...] = ()

    def layout(
        self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int
    ) -> AttentionLayout | None:
        """Two partitions of the joined projection."""
        attention = _below(path, self.module)
        sections = n_kv_heads if self.grouped else 1
        kv_heads = {"K": n_kv_heads, "V": n_kv_heads}
        blocks = [
            *_cut(lookup, f"{attention}.{self.query}", ("Q",), {"Q": n_heads}),
            *_cut(lookup, f"{attention}.{self.key_value}", self.order, kv_heads, sections),
        ]
        return _attention(lookup, layer, attention, self.output, (n_heads, n_kv_heads), blocks, self.coupled)


@dataclass(frozen=True)
class Latent:
    """Keys and values from a shared low-rank latent (DeepSeek's MLA).

    Each head's rows of the ``expand`` projection are [key without position | value], and their sizes differ
    from the query's. The projections onto the latent and the key with position serve all heads: they are no
    head's. Queries may go through a latent of their own.
    """

    module: str = "self_attn"
    query: str = "q_b_proj"
    direct_query: str = "q_proj"
    expand: str = "kv_b_proj"
    output: str = "o_proj"
    optional: bool = False

    def layout(
        self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int
    ) -> AttentionLayout | None:
        """The value's size is that of a head's context; what is left is the key's."""
        del n_kv_heads  # every query head has a key and a value of its own
        attention = _below(path, self.module)
        if self.optional and not _has_projection(lookup, f"{attention}.{self.expand}"):
            return None
        low_rank = _has_projection(lookup, f"{attention}.{self.query}")
        query = f"{attention}.{self.query if low_rank else self.direct_query}"
        _, output = projection(lookup, f"{attention}.{self.output}")
        value = _divide(in_features(output), n_heads, attention)
        every = {"K": n_heads, "V": n_heads}
        blocks = [
            *_cut(lookup, query, ("Q",), {"Q": n_heads}),
            *_cut(lookup, f"{attention}.{self.expand}", ("K", "V"), every, n_heads, fixed={"V": value}),
        ]
        return _attention(lookup, layer, attention, self.output, (n_heads, n_heads), blocks)


@dataclass(frozen=True)
class Mlp:
    """An MLP whose channels are output features of the ``expand`` projections and inputs of ``contract``.

    Attributes:
        module: path of the MLP in the layer; empty for projections in the layer itself.
        expand, contract: paths of the projections in the MLP.
        stacked: how many rows of each ``expand`` projection a channel has, one in each of so many equal
            parts: 2 for the [gate | up] of Phi-3.
        optional: layers without these modules, or with experts in their place, have no channels.
    """

    module: str
    expand: tuple[str, ...]
    contract: str
    stacked: int = 1
    optional: bool = False

    def layout(self, lookup: Lookup, path: str, layer: int) -> MlpLayout | None:
        """One piece of width 1 per channel in each projection."""
        mlp = _below(path, self.module)
        if self.optional and not _has_projection(lookup, f"{mlp}.{self.expand[0]}"):
            return None
        weights, biases = [], []
        for name in self.expand:
            where, module = projection(lookup, f"{mlp}.{name}")
            channels = _divide(out_features(module), self.stacked, where)
            shape, axis = weight_shape(module), output_axis(module)
            for offset in range(0, self.stacked * channels, channels):
                weights.append(Partition.regular(f"{where}.weight", shape, axis, channels, 1, offset=offset))
                if has_bias(module):
                    every = (self.stacked * channels,)
                    biases.append(Partition.regular(f"{where}.bias", every, 0, channels, 1, offset=offset))
        where, module = projection(lookup, f"{mlp}.{self.contract}")
        shape, axis = weight_shape(module), 1 - output_axis(module)
        weights.append(Partition.regular(f"{where}.weight", shape, axis, shape[axis], 1))
        return MlpLayout(layer, mlp, tuple(weights), tuple(biases))


class _Run(NamedTuple):
    """A block's entries in one section: how many heads, and how wide each is."""

    heads: int
    width: int


def _cut(
    lookup: Lookup,
    where: str,
    order: Sequence[str],
    heads: dict[str, int],
    sections: int = 1,
    *,
    fixed: dict[str, int] | None = None,
) -> list[HeadBlock]:
    """Blocks of one projection: ``sections`` equal runs of output features, each the blocks in ``order``.

    All blocks have one width, but for those whose width is ``fixed``.
    """
    where, module = projection(lookup, where)
    fixed = fixed or {}
    left = out_features(module) - sum(heads[name] * width for name, width in fixed.items())
    free = sum(heads[name] for name in order if name not in fixed)
    width = _divide(left, free, where)
    runs = {
        name: _Run(
            _divide(heads[name], sections, where, what="heads", among="sections"), fixed.get(name, width)
        )
        for name in order
    }
    starts: dict[str, list[int]] = {name: [] for name in order}
    position = 0
    for _ in range(sections):
        for name, run in runs.items():
            starts[name].extend(range(position, position + run.heads * run.width, run.width))
            position += run.heads * run.width
    return [_block(name, where, module, tuple(starts[name]), runs[name].width) for name in order]


def _block(name: str, where: str, module: nn.Module, starts: tuple[int, ...], width: int) -> HeadBlock:
    weight = Partition(f"{where}.weight", weight_shape(module), output_axis(module), starts, width)
    bias = None
    if has_bias(module):
        bias = Partition(f"{where}.bias", (out_features(module),), 0, starts, width)
    return HeadBlock(name, weight, bias)


def _attention(
    lookup: Lookup,
    layer: int,
    attention: str,
    output: str,
    heads: tuple[int, int],
    blocks: Sequence[HeadBlock],
    coupled: tuple[str, ...] = (),
) -> AttentionLayout:
    """The blocks with O, which is cut on its input side: that is the heads' contexts, head after head."""
    where, module = projection(lookup, f"{attention}.{output}")
    n_heads, n_kv_heads = heads
    shape, axis = weight_shape(module), 1 - output_axis(module)
    width = _divide(shape[axis], n_heads, where)
    contexts = HeadBlock("O", Partition.regular(f"{where}.weight", shape, axis, n_heads, width))
    by_name = {block.name: block for block in (*blocks, contexts)}
    # Q, K, V, O first, in this order: it is that of the tables
    names = [name for name in ("Q", "K", "V", "O") if name in by_name]
    ordered = [by_name[name] for name in (*names, *(name for name in by_name if name not in names))]
    return AttentionLayout(layer, attention, where, n_heads, n_kv_heads, tuple(ordered), coupled=coupled)


def _below(path: str, module: str) -> str:
    return f"{path}.{module}" if module else path


def _has_projection(lookup: Lookup, path: str) -> bool:
    try:
        return is_linear_map(projection(lookup, path)[1])
    except (AdapterError, AttributeError, KeyError):
        return False


def _divide(count: int, by: int, where: str, *, what: str = "features", among: str = "heads") -> int:
    if count % by or not count:
        raise AdapterError(f"{where}: {count} {what} cannot be divided among {by} {among}")
    return count // by
