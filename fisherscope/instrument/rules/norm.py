"""Layers whose weight scales each feature: ``nn.LayerNorm``, ``nn.RMSNorm``, the RMSNorms of transformers.

Their classes are many, and some scale by the weight and some by one more than the weight; some serve all
features, some those of one head. What they share is checked on the module itself: the output is an affine
function of each entry of the weight, and of no other sample.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fisherscope.instrument.rules.registry import LayerCall, register_rule
from fisherscope.linalg import Dense, PerSampleGradient

_checked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def scales_features(module: nn.Module) -> bool:
    """Whether the module has one weight per feature, and perhaps a bias, and nothing else that is learned."""
    if module not in _checked:
        _checked[module] = _is_affine_in_its_weight(module)
    return _checked[module]


@register_rule(nn.Module, applies=scales_features)
def norm(module: nn.Module, call: LayerCall, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """``g_w = sum_t d_t * dy_t/dw`` and ``g_b = sum_t d_t``, over all positions and heads."""
    d = call.output_gradient
    gradients: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        gradients["weight"] = Dense(_over_positions(module, d * _slope(module, call.inputs)))
    if "bias" in wanted:
        gradients["bias"] = Dense(_over_positions(module, d))
    return gradients


def _over_positions(module: Any, values: Tensor) -> Tensor:
    """``[n, ..., *weight]`` as ``[n, *weight]``: Cohere's norms of queries have a weight per head."""
    return values.reshape(values.shape[0], -1, *module.weight.shape).sum(1)


def _slope(module: nn.Module, x: Tensor) -> Tensor:
    """Derivative of each output with respect to its feature's weight: the normalised input."""
    return _with_weight(module, x, 1.0) - _with_weight(module, x, 0.0)


def _with_weight(module: Any, x: Tensor, value: float | Tensor) -> Tensor:
    weight = torch.zeros(module.weight.shape, dtype=x.dtype, device=x.device) + value
    parameters = {"weight": weight}
    if isinstance(getattr(module, "bias", None), Tensor):
        parameters["bias"] = torch.zeros_like(weight)
    own = {name: module._parameters[name] for name in parameters}
    try:
        module._parameters.update(parameters)
        with torch.no_grad():
            out: Tensor = module.forward(x)  # not the module itself: other people's hooks would see it
    finally:
        module._parameters.update(own)
    return out


def _is_affine_in_its_weight(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    if weight is None or weight.dim() == 0 or not set(own) <= {"weight", "bias"} or any(module.children()):
        return False
    generator = torch.Generator().manual_seed(0)
    # a model without weights, of which only sizes are asked, has no values to compare
    device = torch.device("cpu") if weight.is_meta else weight.device
    x = torch.randn(2, 3, *weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    scale = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
    modes = module.training
    try:
        module.training = False
        origin, slope = _with_weight(module, x, 0.0), _slope(module, x)
        found, alone = _with_weight(module, x, scale), _with_weight(module, x[:1], scale)
    except Exception:  # whatever it wants, it is not one tensor of features
        return False
    finally:
        module.training = modes
    if found.shape != x.shape or not torch.allclose(found[:1], alone, rtol=1e-4, atol=1e-4):
        return False
    return torch.allclose(found, origin + slope * scale, rtol=1e-4, atol=1e-4)
