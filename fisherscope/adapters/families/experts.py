"""Families with mixtures of experts: their attention, and the MLPs of their dense layers.

Experts hold their weights as three-dimensional parameters whose channels are not described.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherscope.adapters.build import Family
from fisherscope.adapters.families.llama import GATED, TIED_BY_NORM, decoder
from fisherscope.adapters.patterns import MlpPattern, Separate
from fisherscope.adapters.registry import register


@register("mixtral", "qwen2_moe", "qwen3_moe")
def mixtral(model: nn.Module, config: Any) -> Family:
    """Llama's attention; Qwen's may have dense layers among the others."""
    return decoder(config, Separate(), _dense_layers(model))


@register("olmoe")
def olmoe(model: nn.Module, config: Any) -> Family:
    """Norms over all heads of Q and of K."""
    return decoder(config, TIED_BY_NORM, _dense_layers(model))


def _dense_layers(model: nn.Module) -> list[MlpPattern | None]:
    """The pattern for the layers whose MLP has no experts."""
    layers: Any = getattr(model, "base_model", model).layers
    return [
        GATED if isinstance(getattr(layer.mlp, "gate_proj", None), nn.Linear) else None for layer in layers
    ]
