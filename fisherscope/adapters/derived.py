"""Weights that a module computes from other parameters each time it runs: pruned, normed or parametrised.

``torch.nn.utils.prune`` and the older ``weight_norm`` and ``spectral_norm`` compute them in a hook before
the forward, and leave them on the module as a plain tensor; those of ``torch.nn.utils.parametrize`` are
properties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

Hook = Callable[[nn.Module, Any], Any]


def computing_hooks(module: nn.Module) -> dict[str, Hook]:
    """The hooks that compute a tensor of a module before its forward: name of the tensor -> hook."""
    found: dict[str, Hook] = {}
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
        if isinstance(name, str) and isinstance(vars(module).get(name), Tensor):
            found[name] = hook
    return found


def derived_tensors(module: nn.Module) -> dict[str, str]:
    """Tensors of a module that are computed from other parameters: name -> by what, in words."""
    found = {name: type(getattr(h, "__self__", h)).__name__ for name, h in computing_hooks(module).items()}
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        for name, chain in parametrizations.items():
            found[name] = " and ".join(type(one).__name__.lstrip("_") for one in chain)
    return found


def raw_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters inside of a module's parametrisations, by their names from the module on."""
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        yield from parametrizations.named_parameters(prefix="parametrizations", remove_duplicate=False)


def is_derived_map(module: nn.Module) -> bool:
    """Whether the module is a linear layer whose matrix is computed from other parameters."""
    # torch gives a parametrised module a class of its own, with the original one as its base
    is_linear = any(kind is nn.Linear or kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    weight: Any = module.weight if "weight" in derived_tensors(module) else None
    return is_linear and isinstance(weight, Tensor) and weight.dim() == 2


def derived_maps(model: nn.Module) -> dict[str, str]:
    """Linear layers of a model whose matrix is computed: path -> by what, in words."""
    return {
        path: derived_tensors(module)["weight"]
        for path, module in model.named_modules()
        if is_derived_map(module)
    }
