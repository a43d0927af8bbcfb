"""The logits in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fisherscope.errors import FisherscopeError


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """The logits of a forward pass without labels: by name, or the first of a tuple.

    Raises:
        FisherscopeError: there are none.
    """
    if isinstance(output, Tensor):
        found: Any = output
    elif isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    else:
        found = output[0] if isinstance(output, tuple | list) and output else None
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    if isinstance(output, Mapping):
        holds = f"it holds {[str(key) for key in output]}"
    elif isinstance(output, tuple | list):
        holds = f"its entries are {[type(entry).__name__ for entry in output]}"
    else:
        holds = "it has no attribute of that name"
    raise FisherscopeError(
        f"{type(model).__name__}.forward returns a {type(output).__name__} without logits ({holds}): return "
        'a tensor of logits, a dict with "logits", or a tuple that begins with them, or pass '
        "objective=loss(model, batch)"
    )
