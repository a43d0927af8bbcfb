"""How attention projections and MLPs are laid out, as data: no pattern copies or splits a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from fisherscope.errors import AdapterError
from fisherscope.layout import AttentionLayout, HeadBlock, MlpLayout, Partition

Lookup = Callable[[str], nn.Module]


class AttentionPattern(Protocol):
    """Finds the heads of one attention module."""

    def layout(self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int) -> AttentionLayout:
        """The layout of the attention module in the layer at ``path``."""
        ...


class MlpPattern(Protocol):
    """Finds the channels of one MLP."""

    def layout(self, lookup: Lookup, path: str, layer: int) -> MlpLayout:
        """The layout of the MLP in the layer at ``path``."""
        ...


@dataclass(frozen=True)
class Separate:
    """Q, K and V each have a projection of their own (Llama, Qwen, Mistral, OPT, BERT, ...).

    ``coupled`` names the blocks that a norm over all heads ties (OLMo 2).
    """

    module: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    coupled: tuple[str, ...] = ()

    def layout(self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int) -> AttentionLayout:
        """One partition of each projection along its output features; widths come from the weights."""
        attention = f"{path}.{self.module}"
        blocks = []
        for name, projection, heads in (
            ("Q", self.query, n_heads),
            ("K", self.key, n_kv_heads),
            ("V", self.value, n_kv_heads),
        ):
            where = f"{attention}.{projection}"
            module = lookup(where)
            width = _divide(out_features(module), heads, where)
            starts = tuple(range(0, heads * width, width))
            blocks.append(_input_block(name, where, module, starts=starts, width=width))
        output = f"{attention}.{self.output}"
        blocks.append(_output_block(output, lookup(output), n_heads))
        return AttentionLayout(
            layer, attention, output, n_heads, n_kv_heads, tuple(blocks), coupled=self.coupled
        )


@dataclass(frozen=True)
class Concat:
    """One fused projection whose output is [all Q heads | all K heads | all V heads] (GPT-2, Phi-3, MPT)."""

    module: str
    fused: str
    output: str

    def layout(self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int) -> AttentionLayout:
        """Three partitions of the fused projection, one after the other."""
        attention = f"{path}.{self.module}"
        return _fused_layout(lookup, attention, self.fused, self.output, layer, n_heads, n_kv_heads)


@dataclass(frozen=True)
class Grouped:
    """One fused projection, kv head by kv head: its query heads, its key, its value.

    With one kv head per query head that is [q k v | q k v | ...] (GPT-NeoX, Bloom); with several query heads
    per kv head [q q k v | q q k v | ...] (Falcon 40B and later); with a single kv head it is the same as
    :class:`Concat` (Falcon 7B).
    """

    module: str
    fused: str
    output: str

    def layout(self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int) -> AttentionLayout:
        """Three partitions of the fused projection, interleaved with the kv head's period."""
        attention = f"{path}.{self.module}"
        return _fused_layout(
            lookup, attention, self.fused, self.output, layer, n_heads, n_kv_heads, sections=n_kv_heads
        )


@dataclass(frozen=True)
class Sectioned:
    """One fused projection in ``sections`` equal parts, each with its share of the heads of every block.

    CodeGen was trained on four devices and kept their four parts, each [queries | values | keys].
    """

    module: str
    fused: str
    output: str
    sections: int
    order: tuple[str, str, str] = ("Q", "K", "V")

    def layout(self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int) -> AttentionLayout:
        """Three partitions of the fused projection, each in ``sections`` runs."""
        attention = f"{path}.{self.module}"
        return _fused_layout(
            lookup,
            attention,
            self.fused,
            self.output,
            layer,
            n_heads,
            n_kv_heads,
            sections=self.sections,
            order=self.order,
        )


@dataclass(frozen=True)
class Mlp:
    """An MLP whose channels are output features of the ``expand`` projections and inputs of ``contract``.

    ``stacked`` tells how many rows of each ``expand`` projection a channel has, one in each of so many equal
    parts: 2 for the [gate | up] of Phi-3. An empty ``module`` stands for projections in the layer itself.
    """

    module: str
    expand: tuple[str, ...]
    contract: str
    stacked: int = 1

    def layout(self, lookup: Lookup, path: str, layer: int) -> MlpLayout:
        """One piece of width 1 per channel in each projection."""
        mlp = f"{path}.{self.module}" if self.module else path
        weights, biases = [], []
        for projection in self.expand:
            where = f"{mlp}.{projection}"
            module = lookup(where)
            channels = _divide(out_features(module), self.stacked, where)
            shape, axis = _weight_shape(module), output_axis(module)
            for offset in range(0, self.stacked * channels, channels):
                weights.append(Partition.regular(f"{where}.weight", shape, axis, channels, 1, offset=offset))
                if has_bias(module):
                    every = (self.stacked * channels,)
                    biases.append(Partition.regular(f"{where}.bias", every, 0, channels, 1, offset=offset))
        where = f"{mlp}.{self.contract}"
        module = lookup(where)
        shape, axis = _weight_shape(module), 1 - output_axis(module)
        weights.append(Partition.regular(f"{where}.weight", shape, axis, shape[axis], 1))
        return MlpLayout(layer, mlp, tuple(weights), tuple(biases))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is [in, out], as in transformers' ``Conv1D``, and not [out, in]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def output_axis(module: nn.Module) -> int:
    """The axis of the weight that runs over output features."""
    return 1 if is_transposed(module) else 0


def out_features(module: nn.Module) -> int:
    """Number of output features of a projection."""
    return _weight_shape(module)[output_axis(module)]


def has_bias(module: nn.Module) -> bool:
    """Whether the projection has a bias."""
    return isinstance(getattr(module, "bias", None), nn.Parameter)


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise AdapterError(
            f"{type(module).__name__} has no plain matrix as weight: quantised or packed projections have no "
            "per-head slices; load the model without quantisation"
        )
    return tuple(weight.shape)


def _fused_layout(
    lookup: Lookup,
    attention: str,
    fused: str,
    output: str,
    layer: int,
    n_heads: int,
    n_kv_heads: int,
    *,
    sections: int = 1,
    order: tuple[str, str, str] = ("Q", "K", "V"),
) -> AttentionLayout:
    """Heads of one fused projection: ``sections`` equal runs, each of them the blocks in ``order``."""
    where = f"{attention}.{fused}"
    module = lookup(where)
    width = _divide(out_features(module), n_heads + 2 * n_kv_heads, where)
    share = {
        name: _divide(heads, sections, where, what="heads", among="sections")
        for name, heads in (("Q", n_heads), ("K", n_kv_heads), ("V", n_kv_heads))
    }
    starts: dict[str, list[int]] = {"Q": [], "K": [], "V": []}
    position = 0
    for _ in range(sections):
        for name in order:
            starts[name].extend(range(position, position + share[name] * width, width))
            position += share[name] * width
    out = f"{attention}.{output}"
    blocks = (
        *(
            _input_block(name, where, module, starts=tuple(found), width=width)
            for name, found in starts.items()
        ),
        _output_block(out, lookup(out), n_heads),
    )
    return AttentionLayout(layer, attention, out, n_heads, n_kv_heads, blocks)


def _input_block(
    name: str, where: str, module: nn.Module, *, starts: tuple[int, ...], width: int
) -> HeadBlock:
    weight = Partition(f"{where}.weight", _weight_shape(module), output_axis(module), starts, width)
    bias = None
    if has_bias(module):
        bias = Partition(f"{where}.bias", (out_features(module),), 0, starts, width)
    return HeadBlock(name, weight, bias)


def _output_block(where: str, module: nn.Module, heads: int) -> HeadBlock:
    """O is cut on its input side: its input is the heads' contexts, head after head."""
    shape = _weight_shape(module)
    axis = 1 - output_axis(module)
    width = _divide(shape[axis], heads, where)
    return HeadBlock("O", Partition.regular(f"{where}.weight", shape, axis, heads, width))


def _divide(count: int, by: int, where: str, *, what: str = "features", among: str = "heads") -> int:
    if count % by:
        raise AdapterError(f"{where}: {count} {what} cannot be divided among {by} {among}")
    return count // by
