"""Models that were made under ``torch.inference_mode``, whose tensors take part in no backward pass."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.errors import AdapterError


@contextmanager
def ordinary_tensors(model: nn.Module) -> Iterator[None]:
    """Put ordinary tensors over the same memory in the place of a model's inference tensors, for a while.

    Parameters, buffers and other tensors that a module holds by name are exchanged; what the model assigns
    meanwhile stays. No entry is copied, so that changes in place are seen in both.

    Raises:
        AdapterError: an inference tensor that the model holds elsewhere was needed for gradients.
    """
    exchanged = _exchange(model)
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise AdapterError(
            "a tensor that was made under torch.inference_mode takes part in the loss, and such a tensor can "
            "have no part in a backward pass: make the model, and what its objective uses, outside of "
            f"torch.inference_mode, or clone() the tensor outside of it ({error})"
        ) from error
    finally:
        for held, name, before, ours in exchanged:
            if held.get(name) is ours:
                held[name] = before


def _exchange(model: nn.Module) -> list[tuple[MutableMapping[str, Any], str, Tensor, Tensor]]:
    """Exchange every inference tensor: who held which under what name, and what is there now."""
    ordinary: dict[int, Tensor] = {}
    exchanged: list[tuple[MutableMapping[str, Any], str, Tensor, Tensor]] = []
    for module in model.modules():
        places: list[Any] = [module._parameters, module._buffers, vars(module)]
        for held in places:
            for name, value in list(held.items()):
                if isinstance(value, Tensor) and value.is_inference():
                    # tied weights stay one tensor
                    ours = ordinary.setdefault(id(value), _over_the_same_memory(value))
                    held[name] = ours
                    exchanged.append((held, name, value, ours))
    return exchanged


def _over_the_same_memory(tensor: Tensor) -> Tensor:
    place = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    place.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(place, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else place
