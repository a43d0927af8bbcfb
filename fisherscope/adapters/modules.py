"""Facts about single modules: which are linear maps, and which way round their weight is."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fisherscope.adapters.derived import derived_tensors
from fisherscope.errors import AdapterError

_checked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_linear_map(module: nn.Module) -> bool:
    """Whether the module is a linear layer: ``nn.Linear``, a subclass, or transformers' ``Conv1D``.

    One with a forward of its own (Falcon's class has one, so has the grouped projection of DeepSeek V4, and
    anybody may put one on a single module) is one if it gives what the matrix gives.
    """
    weight = getattr(module, "weight", None)
    plain = isinstance(module, nn.Linear) or is_transposed(module)
    if not plain or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return False
    if has_replaced_forward(module):
        return _gives_what_its_matrix_gives(module)
    if type(module).forward is nn.Linear.forward or is_transposed(module):
        return True
    if module not in _checked:
        _checked[module] = _gives_what_its_matrix_gives(module)
    return _checked[module]


def _gives_what_its_matrix_gives(module: Any) -> bool:
    weight: Tensor = module.weight.detach()
    features = weight.shape[1 - output_axis(module)]
    x = torch.randn(
        2, features, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(weight)
    expected = x @ (weight if is_transposed(module) else weight.T)
    if isinstance(module.bias, Tensor):
        expected = expected + module.bias.detach()
    try:
        with torch.no_grad():
            # not through __call__: other people's hooks are none of this check's business
            found = module.forward(x)
    except Exception:  # whatever it wants, it is not a matrix of features
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    tolerance = 32 * torch.finfo(weight.dtype).eps * math.sqrt(features)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether somebody has put another forward on this one module than its class has."""
    return "forward" in vars(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is [in, out], as in transformers' ``Conv1D``, and not [out, in]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def output_axis(module: nn.Module) -> int:
    """The axis of the weight that runs over output features."""
    return 1 if is_transposed(module) else 0


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a projection's weight.

    Raises:
        AdapterError: the module has no matrix as weight.
    """
    weight = getattr(module, "weight", None)
    if how := derived_tensors(module).get("weight"):
        raise AdapterError(
            f"{type(module).__name__} computes its weight from other parameters by {how}: it has no entries "
            "of its own to cut heads from"
        )
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter) and weight.is_floating_point():
        raise AdapterError(
            f"the weight of {type(module).__name__} is a tensor that is no parameter: it has no gradient "
            "of its own to cut heads from; make it an nn.Parameter, or use torch.nn.utils.parametrize"
        )
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise AdapterError(
            f"{type(module).__name__} has no plain matrix as weight: quantised or packed projections have no "
            "per-head slices; load the model without quantisation"
        )
    return tuple(weight.shape)


def out_features(module: nn.Module) -> int:
    """Number of output features of a projection."""
    return weight_shape(module)[output_axis(module)]


def in_features(module: nn.Module) -> int:
    """Number of input features of a projection."""
    return weight_shape(module)[1 - output_axis(module)]


def has_bias(module: nn.Module) -> bool:
    """Whether the projection has a bias."""
    return isinstance(getattr(module, "bias", None), nn.Parameter)
