"""transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored transposed, [in, out]."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from fisherscope.instrument.rules.linear import backward_image, by_position, forward_image
from fisherscope.instrument.rules.registry import LayerCall, register_rule
from fisherscope.linalg import Dense, Factored, PerSampleGradient


@register_rule(Conv1D)
def conv1d(module: nn.Module, call: LayerCall, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """``g_W = sum_t a_t d_t'`` and ``g_b = sum_t d_t``: as for ``nn.Linear`` with the sides exchanged."""
    a, d = by_position(call.inputs), by_position(call.output_gradient)
    gradients: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        gradients["weight"] = Factored(
            left=a, right=d, left_image=forward_image(module, call), right_image=backward_image(call)
        )
    if "bias" in wanted:
        gradients["bias"] = Dense(d.sum(1))
    return gradients
