"""``nn.Linear`` and its subclasses: ``y = a W' + b`` with W [out, in]."""

from __future__ import annotations

from torch import Tensor, nn

from fisherscope.adapters.modules import is_linear_map
from fisherscope.instrument.rules.registry import LayerCall, register_rule
from fisherscope.linalg import Dense, Factored, PerSampleGradient


@register_rule(nn.Linear, applies=is_linear_map)
def linear(module: nn.Module, call: LayerCall, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """``g_W = sum_t d_t a_t'`` and ``g_b = sum_t d_t``; the layer itself has formed a W' and d W."""
    a, d = by_position(call.inputs), by_position(call.output_gradient)
    gradients: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        gradients["weight"] = Factored(
            left=d, right=a, left_image=backward_image(call), right_image=forward_image(module, call)
        )
    if "bias" in wanted:
        gradients["bias"] = Dense(d.sum(1))
    return gradients


def by_position(values: Tensor) -> Tensor:
    """``[n, ..., features]`` as ``[n, positions, features]``."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


def forward_image(module: nn.Module, call: LayerCall) -> Tensor | None:
    """The layer's output less its bias: the weight applied to the input, ``[n, positions, out]``."""
    if call.outputs is None:
        return None
    y = by_position(call.outputs)
    bias = module.bias
    return y - bias.detach() if isinstance(bias, Tensor) else y


def backward_image(call: LayerCall) -> Tensor | None:
    """The input's gradient: the weight applied to the output gradient, ``[n, positions, in]``."""
    return None if call.input_gradient is None else by_position(call.input_gradient)
