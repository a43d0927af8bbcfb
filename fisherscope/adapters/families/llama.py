"""Llama and the families that share its module names: separate projections, grouped-query attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherscope.adapters.build import Family
from fisherscope.adapters.patterns import Mlp, Separate
from fisherscope.adapters.registry import register


@register("llama", "mistral", "qwen2", "qwen3")
def llama(model: nn.Module, config: Any) -> Family:
    """Head widths come from the weights, so an explicit ``head_dim`` (Qwen3, Mistral) needs no case."""
    del model
    return Family(
        layers="layers",
        attention=Separate(),
        mlp=Mlp("mlp", expand=("gate_proj", "up_proj"), contract="down_proj"),
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
