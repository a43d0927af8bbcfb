"""GPT-2: one fused ``Conv1D`` for Q, K and V."""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherscope.adapters.build import Family
from fisherscope.adapters.patterns import Concat, Mlp
from fisherscope.adapters.registry import register


@register("gpt2")
def gpt2(model: nn.Module, config: Any) -> Family:
    """Heads are columns: the weight of a ``Conv1D`` is [in, out]."""
    del model
    return Family(
        layers="h",
        attention=Concat("attn", fused="c_attn", output="c_proj"),
        mlp=Mlp("mlp", expand=("c_fc",), contract="c_proj"),
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
    )
