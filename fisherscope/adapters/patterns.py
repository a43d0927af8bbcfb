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
    """Q, K and V each have a projection of their own (Llama, Qwen, Mistral, OPT, BERT, ...)."""

    module: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"

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
            blocks.append(_input_block(name, where, module, heads=heads, width=width))
        output = f"{attention}.{self.output}"
        blocks.append(_output_block(output, lookup(output), n_heads))
        return AttentionLayout(layer, attention, output, n_heads, n_kv_heads, tuple(blocks))


@dataclass(frozen=True)
class Concat:
    """One fused projection whose output is [all Q heads | all K heads | all V heads] (GPT-2, Phi-3, MPT)."""

    module: str
    fused: str
    output: str

    def layout(self, lookup: Lookup, path: str, layer: int, n_heads: int, n_kv_heads: int) -> AttentionLayout:
        """Three partitions of the fused projection, one after the other."""
        attention = f"{path}.{self.module}"
        where = f"{attention}.{self.fused}"
        fused = lookup(where)
        width = _divide(out_features(fused), n_heads + 2 * n_kv_heads, where)
        blocks = []
        offset = 0
        for name, heads in (("Q", n_heads), ("K", n_kv_heads), ("V", n_kv_heads)):
            blocks.append(_input_block(name, where, fused, heads=heads, width=width, offset=offset))
            offset += heads * width
        output = f"{attention}.{self.output}"
        blocks.append(_output_block(output, lookup(output), n_heads))
        return AttentionLayout(layer, attention, output, n_heads, n_kv_heads, tuple(blocks))


@dataclass(frozen=True)
class Mlp:
    """An MLP whose channels are output features of the ``expand`` projections and inputs of ``contract``."""

    module: str
    expand: tuple[str, ...]
    contract: str

    def layout(self, lookup: Lookup, path: str, layer: int) -> MlpLayout:
        """One piece of width 1 per channel in each projection."""
        mlp = f"{path}.{self.module}"
        weights, biases = [], []
        for projection in self.expand:
            where = f"{mlp}.{projection}"
            module = lookup(where)
            channels = out_features(module)
            weights.append(
                Partition.regular(f"{where}.weight", _weight_shape(module), output_axis(module), channels, 1)
            )
            if has_bias(module):
                biases.append(Partition.regular(f"{where}.bias", (channels,), 0, channels, 1))
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


def _input_block(
    name: str, where: str, module: nn.Module, *, heads: int, width: int, offset: int = 0
) -> HeadBlock:
    shape = _weight_shape(module)
    weight = Partition.regular(f"{where}.weight", shape, output_axis(module), heads, width, offset=offset)
    bias = None
    if has_bias(module):
        bias = Partition.regular(f"{where}.bias", (out_features(module),), 0, heads, width, offset=offset)
    return HeadBlock(name, weight, bias)


def _output_block(where: str, module: nn.Module, heads: int) -> HeadBlock:
    """O is cut on its input side: its input is the heads' contexts, head after head."""
    shape = _weight_shape(module)
    axis = 1 - output_axis(module)
    width = _divide(shape[axis], heads, where)
    return HeadBlock("O", Partition.regular(f"{where}.weight", shape, axis, heads, width))


def _divide(features: int, heads: int, where: str) -> int:
    if features % heads:
        raise AdapterError(f"{where}: {features} features cannot be divided among {heads} heads")
    return features // heads
