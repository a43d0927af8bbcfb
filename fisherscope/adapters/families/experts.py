"""Families with mixtures of experts: their attention, and the MLPs of dense layers and of shared experts.

The routed experts hold their weights as stacked parameters, which are found without an adapter's help.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fisherscope.adapters.build import Stack
from fisherscope.adapters.families.llama import GATED, TIED_BY_NORM, decoder
from fisherscope.adapters.patterns import Latent, Mlp, Separate
from fisherscope.adapters.registry import register

_DENSE = replace(GATED, optional=True)
_SHARED = replace(_DENSE, module="mlp.shared_expert")
_SEVERAL_SHARED = replace(_DENSE, module="mlp.shared_experts")


@register("mixtral", "qwen2_moe", "qwen3_moe")
def mixtral(model: nn.Module, config: Any) -> Stack:
    """Separate projections; dense layers and shared experts where there are any."""
    del model
    return decoder(config, Separate(), (_DENSE, _SHARED))


@register("olmoe")
def olmoe(model: nn.Module, config: Any) -> Stack:
    """Separate projections, coupled: norms run over all heads of Q and of K."""
    del model
    return decoder(config, TIED_BY_NORM, None)


@register("gpt_oss")
def gpt_oss(model: nn.Module, config: Any) -> Stack:
    """Separate projections and a sink, a logit per head that takes attention away."""
    del model
    return decoder(config, Separate(sinks="sinks"), None)


@register("qwen3_next")
def qwen3_next(model: nn.Module, config: Any) -> Stack:
    """Separate projections, Q with gates; layers of linear attention have no such heads."""
    del model
    return decoder(config, Separate(gated=True, optional=True), (_DENSE, _SHARED))


@register("llama4", "llama4_text")
def llama4(model: nn.Module, config: Any) -> Stack:
    """Separate projections; dense layers and mixtures with a shared expert in turns."""
    del model
    dense: Mlp = replace(_DENSE, module="feed_forward")
    return decoder(config, Separate(), (dense, replace(dense, module="feed_forward.shared_expert")))


@register("deepseek_v2", "deepseek_v3")
def deepseek(model: nn.Module, config: Any) -> Stack:
    """Latent attention: keys and values expanded from what all heads share."""
    del model
    return decoder(config, Latent(), (_DENSE, _SEVERAL_SHARED))
