"""``nn.Linear`` and its subclasses: ``y = a W' + b`` with W [out, in]."""

from __future__ import annotations

from torch import Tensor, nn

from fisherscope.instrument.rules.registry import register_rule
from fisherscope.linalg import Dense, Factored, PerSampleGradient


@register_rule(nn.Linear)
def linear(
    module: nn.Module, inputs: Tensor, output_gradient: Tensor, wanted: frozenset[str]
) -> dict[str, PerSampleGradient]:
    """``g_W = sum_t d_t a_t'`` and ``g_b = sum_t d_t``."""
    del module
    a, d = by_position(inputs), by_position(output_gradient)
    gradients: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        gradients["weight"] = Factored(left=d, right=a)
    if "bias" in wanted:
        gradients["bias"] = Dense(d.sum(1))
    return gradients


def by_position(values: Tensor) -> Tensor:
    """``[n, ..., features]`` as ``[n, positions, features]``."""
    return values.reshape(values.shape[0], -1, values.shape[-1])
