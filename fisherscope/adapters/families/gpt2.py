"""GPT-2 and what was built after it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fisherscope.adapters.build import Stack
from fisherscope.adapters.patterns import AttentionPattern, Concat, JoinedKeyValue, Mlp, MlpPattern, Separate
from fisherscope.adapters.registry import register


@register("gpt2")
def gpt2(model: nn.Module, config: Any) -> Stack | list[Stack]:
    """All queries, all keys, all values in one Conv1D: heads are columns of its weight.

    Cross attention, where it is configured, has a Conv1D for the queries and one for keys and values.
    """
    del model
    own = _decoder(
        config,
        "h",
        Concat("attn", fused="c_attn", output="c_proj"),
        Mlp("mlp", expand=("c_fc",), contract="c_proj"),
    )
    if not getattr(config, "add_cross_attention", False):
        return own
    cross = JoinedKeyValue("crossattention", query="q_attn", key_value="c_attn", output="c_proj")
    return [own, replace(own, attention=cross, mlp=None, name="cross")]


@register("gpt_neo")
def gpt_neo(model: nn.Module, config: Any) -> Stack:
    """Separate projections; global and local attention in turns."""
    del model
    return _decoder(
        config,
        "h",
        Separate("attn.attention", output="out_proj"),
        Mlp("mlp", expand=("c_fc",), contract="c_proj"),
    )


@register("gptj")
def gptj(model: nn.Module, config: Any) -> Stack:
    """Separate projections; attention and MLP side by side."""
    del model
    return _decoder(
        config, "h", Separate("attn", output="out_proj"), Mlp("mlp", expand=("fc_in",), contract="fc_out")
    )


@register("opt")
def opt(model: nn.Module, config: Any) -> Stack:
    """Separate projections; the MLP's two lie in the layer itself."""
    del model
    return _decoder(
        config, "decoder.layers", Separate(output="out_proj"), Mlp("", expand=("fc1",), contract="fc2")
    )


def _decoder(config: Any, layers: str, attention: AttentionPattern, mlp: MlpPattern) -> Stack:
    """As many kv heads as query heads."""
    return Stack(layers, attention, mlp, config.num_attention_heads, config.num_attention_heads)
