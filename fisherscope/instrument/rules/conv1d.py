"""transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored transposed, [in, out]."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisherscope.instrument.rules.linear import by_position
from fisherscope.instrument.rules.registry import register_rule
from fisherscope.linalg import Dense, Factored, PerSampleGradient


@register_rule(Conv1D)
def conv1d(
    module: nn.Module, inputs: Tensor, output_gradient: Tensor, wanted: frozenset[str]
) -> dict[str, PerSampleGradient]:
    """``g_W = sum_t a_t d_t'`` and ``g_b = sum_t d_t``."""
    del module
    a, d = by_position(inputs), by_position(output_gradient)
    gradients: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        gradients["weight"] = Factored(left=a, right=d)
    if "bias" in wanted:
        gradients["bias"] = Dense(d.sum(1))
    return gradients
