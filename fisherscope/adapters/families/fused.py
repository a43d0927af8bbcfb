"""Families whose Q, K and V are one projection, each with its own order of the rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherscope.adapters.build import Stack
from fisherscope.adapters.families.llama import decoder
from fisherscope.adapters.patterns import Concat, Fused, Grouped, Mlp
from fisherscope.adapters.registry import register

_BY_HEAD = Grouped("self_attention", fused="query_key_value", output="dense")
_FOUR_H = Mlp("mlp", expand=("dense_h_to_4h",), contract="dense_4h_to_h")


@register("gpt_neox")
def gpt_neox(model: nn.Module, config: Any) -> Stack:
    """One projection, [query, key, value] head by head.

    The model ignores a ``num_key_value_heads`` in its config.
    """
    del model
    heads = config.num_attention_heads
    return Stack("layers", Grouped("attention", "query_key_value", "dense"), _FOUR_H, heads, heads)


@register("bloom")
def bloom(model: nn.Module, config: Any) -> Stack:
    """One projection, [query, key, value] head by head.

    The attention module adds the residual, so only its projections are looked at.
    """
    del model
    heads = config.num_attention_heads
    return Stack("h", _BY_HEAD, _FOUR_H, heads, heads)


@register("falcon")
def falcon(model: nn.Module, config: Any) -> Stack:
    """One projection, [queries, key, value] kv head by kv head.

    Three layouts that differ in the number of kv heads alone: given, one, or one per query head.
    """
    del model
    heads = config.num_attention_heads
    kv_heads = 1 if config.multi_query else heads
    if config.new_decoder_architecture:  # goes before multi_query, as in the model
        kv_heads = config.num_kv_heads
    return Stack("h", _BY_HEAD, _FOUR_H, heads, kv_heads)


@register("mpt")
def mpt(model: nn.Module, config: Any) -> Stack:
    """One projection, all queries, all keys, all values."""
    del model
    return Stack(
        layers="blocks",
        attention=Concat("attn", fused="Wqkv", output="out_proj"),
        mlp=Mlp("ffn", expand=("up_proj",), contract="down_proj"),
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
    )


@register("codegen")
def codegen(model: nn.Module, config: Any) -> Stack:
    """One projection in four parts, each [queries, values, keys]."""
    del model
    return Stack(
        layers="h",
        attention=Fused("attn", fused="qkv_proj", output="out_proj", sections=4, order=("Q", "V", "K")),
        mlp=Mlp("mlp", expand=("fc_in",), contract="fc_out"),
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
    )


@register("phi3")
def phi3(model: nn.Module, config: Any) -> Stack:
    """One projection, all queries, all keys, all values; gate and up are one, too."""
    del model
    return decoder(
        config,
        Concat("self_attn", fused="qkv_proj", output="o_proj"),
        Mlp("mlp", expand=("gate_up_proj",), contract="down_proj", stacked=2),
    )
