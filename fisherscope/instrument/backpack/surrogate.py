"""A layer whose per-sample gradients are whatever one wants them to be."""

from __future__ import annotations

from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn

from fisherscope.errors import FisherscopeError


def run_on_gradients(extension: BackpropExtension, gradients: Tensor, theta: Tensor) -> Tensor:
    """What a first-order extension saves for a parameter with these per-sample gradients.

    The extension is shown an ``nn.Linear`` with one input feature, which is 1 for every sample: the gradient
    of its weight is, for each sample, the gradient of its output. So the parameter appears as a vector of
    entries, ``[entries, 1]``, with its own values, and the extension's module extension for ``nn.Linear``
    does the work. An extension that looks at a parameter as a matrix finds none.

    Args:
        extension: its results are those of the samples given.
        gradients: ``[n, *shape]``.
        theta: values of the parameter, ``[*shape]``.

    Returns:
        The saved tensor, with trailing ``[entries, 1]`` back in the parameter's shape.

    Raises:
        FisherscopeError: the extension saves nothing for the weight of an ``nn.Linear``.
    """
    shape, entries = theta.shape, theta.numel()
    layer: Any = nn.Linear(1, entries, bias=False, device="meta", dtype=theta.dtype)
    layer.weight = nn.Parameter(theta.detach().reshape(entries, 1))
    layer.input0 = gradients.new_ones(len(gradients), 1)
    layer.output = layer.weight.detach().T.expand(len(gradients), -1)
    with torch.no_grad():
        extension(layer, (None,), (gradients.flatten(1),))
    value = getattr(layer.weight, extension.savefield, None)
    if not isinstance(value, Tensor):
        raise FisherscopeError(
            f"{type(extension).__name__} saves no tensor {extension.savefield!r} for the weight of an "
            "nn.Linear: give it a module extension for nn.Linear with set_module_extension"
        )
    value = value.detach()
    return value.reshape(*value.shape[:-2], *shape) if value.shape[-2:] == (entries, 1) else value
