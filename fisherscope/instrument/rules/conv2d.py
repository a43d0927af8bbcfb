"""``nn.Conv2d``, as it embeds the patches of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fisherscope.instrument.rules.registry import LayerCall, register_rule
from fisherscope.linalg import Dense, PerSampleGradient


def _is_plain(module: Any) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


@register_rule(nn.Conv2d, applies=_is_plain)
def conv2d(module: Any, call: LayerCall, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """``g_W = sum over places of d times the patch under it``, ``g_b = sum over places of d``."""
    d = call.output_gradient.flatten(2)
    gradients: dict[str, PerSampleGradient] = {}
    if "weight" in wanted:
        patches = F.unfold(call.inputs, module.kernel_size, module.dilation, module.padding, module.stride)
        gradients["weight"] = Dense(torch.bmm(d, patches.mT).view(len(d), *module.weight.shape))
    if "bias" in wanted:
        gradients["bias"] = Dense(d.sum(2))
    return gradients
