"""How many samples a forward pass is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def batch_size(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Length of the first axis of the model's main input; None where it is given no tensor."""
    for value in _candidates(model, args, kwargs):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


def _candidates(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    # other inputs, such as positions, may serve all samples with one row
    yield kwargs.get(str(getattr(model, "main_input_name", "input_ids")))
    yield from pytree.tree_leaves(args)
    yield kwargs.get("inputs_embeds")
    yield from pytree.tree_leaves(dict(kwargs))
