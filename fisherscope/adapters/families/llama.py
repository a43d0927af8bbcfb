"""Llama and the families that share its module names: separate projections, grouped-query attention.

Head widths come from the weights, so an explicit ``head_dim`` (Qwen3, Mistral, Gemma) needs no case.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherscope.adapters.build import MlpPatterns, Stack
from fisherscope.adapters.patterns import AttentionPattern, Mlp, Separate
from fisherscope.adapters.registry import register

GATED = Mlp("mlp", expand=("gate_proj", "up_proj"), contract="down_proj")
TIED_BY_NORM = Separate(coupled=("Q", "K"))  # the norms of Q and K run over all heads


@register(
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "vaultgemma",
)
def llama(model: nn.Module, config: Any) -> Stack:
    """Separate projections and an MLP with a gate."""
    del model
    return decoder(config, Separate(), GATED)


@register("olmo2", "olmo3")
def olmo2(model: nn.Module, config: Any) -> Stack:
    """Separate projections, coupled: norms run over all heads of Q and of K."""
    del model
    return decoder(config, TIED_BY_NORM, GATED)


@register("glm", "glm4")
def glm(model: nn.Module, config: Any) -> Stack:
    """Separate projections; the MLP's gate and up projections are one."""
    del model
    return decoder(config, Separate(), Mlp("mlp", expand=("gate_up_proj",), contract="down_proj", stacked=2))


@register("apertus", "arcee", "nemotron")
def arcee(model: nn.Module, config: Any) -> Stack:
    """Separate projections and an MLP without a gate."""
    del model
    return decoder(config, Separate(), Mlp("mlp", expand=("up_proj",), contract="down_proj"))


@register("starcoder2")
def starcoder2(model: nn.Module, config: Any) -> Stack:
    """Separate projections and GPT-2's MLP."""
    del model
    return decoder(config, Separate(), Mlp("mlp", expand=("c_fc",), contract="c_proj"))


@register("phi")
def phi(model: nn.Module, config: Any) -> Stack:
    """Separate projections with biases; attention and MLP side by side."""
    del model
    return decoder(config, Separate(output="dense"), Mlp("mlp", expand=("fc1",), contract="fc2"))


def decoder(config: Any, attention: AttentionPattern, mlp: MlpPatterns) -> Stack:
    """Layers under "layers", head counts under the names that Llama's config uses."""
    return Stack(
        layers="layers",
        attention=attention,
        mlp=mlp,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
